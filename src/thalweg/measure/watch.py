"""Watch any training loop: how sharp is the loss, and where do the updates go?

`watch` takes four lines around a loop, and leaves its training bit for bit as it is.

Example:
    >>> import torch
    >>> torch.manual_seed(0) and None
    >>> model, loss = torch.nn.Linear(8, 3), torch.nn.CrossEntropyLoss()
    >>> data = torch.randn(90, 8), torch.randint(0, 3, (90,))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> with watch(model, loss, data, optimizer, every=10, quiet=True) as watcher:
    ...     for step in range(21):
    ...         optimizer.zero_grad()
    ...         loss(model(data[0]), data[1]).backward()
    ...         optimizer.step()
    >>> [row["step"] for row in watcher.history]
    [0, 10, 20]
    >>> round(watcher.history[-1]["effective_lr_bulk"], 4)
    0.1
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from thalweg.errors import Diverged, InvalidInput, ThalwegError, invalid, unknown_name
from thalweg.loss.guards.wrapped import patterns_inside, unwrapped
from thalweg.loss.layout import ParameterLayout
from thalweg.loss.objective import Objective
from thalweg.loss.protocol import Loss
from thalweg.loss.reduce import Reduction, reduction_in, reduction_of
from thalweg.loss.samples import TensorSamples, are_whole, as_samples
from thalweg.loss.shards import refuse_unfit_shards, take_back
from thalweg.measure.probes import Probe
from thalweg.measure.sinks import Sink, reason_of, say_if_possible
from thalweg.measure.watcher import Watcher, undisturbed
from thalweg.operators.hessian import Hessian
from thalweg.optim.stability import edge_of_stability, stability_threshold
from thalweg.tracking.source import SubspaceSource
from thalweg.tracking.threshold_source import ThresholdSource
from thalweg.tracking.tracker import SubspaceTracker
from thalweg.tracking.wrapping import held_by, require_optimizer, stepping

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

UNITS = ("sharpness", "edge", "one")
"""Of a threshold."""
MOST_INFERRED_CLASSES = 100
# Enough for a mean, few enough to cost nothing.
SAMPLES_CHECKED = 8
TWICE = "take layers and functions that can be differentiated twice"


def watch(
    model: nn.Module,
    loss: Callable[[Any, Any], Tensor] | None,
    data: object,
    optimizer: Optimizer,
    *,
    every: int | None = None,
    quick_every: int | None = None,
    budget: float = 0.05,
    k: int | None = None,
    threshold: float | None = None,
    relative_to: Literal["sharpness", "edge", "one"] = "sharpness",
    file: str | os.PathLike[str] | None = None,
    sinks: Iterable[Sink | str | Callable[[Any, int], Any]] = (),
    samples: int | None = None,
    parameters: Sequence[str] | str | None = None,
    batch_weight: Callable[[Any], Tensor | float] | None = None,
    mode: Literal["eval", "train"] = "eval",
    chunk_size: int | Literal["auto"] | None = "auto",
    group: ProcessGroup | Literal["ask"] | None = "ask",
    error: float = 0.01,
    exact: bool = False,
    seed: int | None = None,
    quiet: bool = False,
    overwrite: bool = False,
    resume_at: int | None = None,
    probes: Sequence[str | Probe] = (),
) -> Watcher:
    """Report the curvature of a loss, and where updates go, while an optimizer trains the model.

    The curvature is that of the model in evaluation mode: dropout is off and batch norm uses its
    running statistics. With `mode="train"` it is that of the loss that is trained: batch norm over
    the batches of `data`, a list of them, and dropout by numbers that `seed` fixes. The model's
    modes are put back before the training continues. Neither parameters, gradients, buffers,
    optimizer state nor random generators change; forward hooks of your own do see the additional
    passes. Under a gradient scaler or `torch.autocast`, reports are made in the precision of the
    parameters.

    A report costs one gradient over the watched data and at k = 10 up to about 20 more for the
    subspace, fewer where it turns slowly, the first one several times that. Under Adam, AdamW and
    RMSprop it also solves for the preconditioned sharpness. Reports come as often as `budget`
    allows: make them cheaper, and more, by `samples` or by giving less data. Between them come
    quick rows, at some two or three gradients: norms of gradient and update, the effective learning
    rate, critical sharpness, gradient noise scale; what needs the subspace is None there.

    Args:
        model, loss, data, batch_weight, chunk_size, group: as for `Objective`; `data` is what the
            curvature is measured over, usually the training set without augmentation.
        optimizer: any optimizer of torch; those of its parameters that belong to the model and
            require a gradient make up theta. Thalweg's own, Accelerate's and Lightning's wrappers
            are looked through, in both directions: the report is about the update that is made.
        every, quick_every, budget, file, sinks, quiet, overwrite, resume_at, probes: as for
            `Watcher`; the budget is 5 % of the training, counted in gradients of samples. Full
            reports go to the console, and every row to a CSV `file` and to all `sinks`: objects
            with log(row, step) and close(), functions of (row, step), or names such as
            "parquet:rows.parquet".
        k: dimension of the dominant subspace; None for the number of classes, where the model's
            output is (n, classes) with at most 100 of them.
        threshold: split at this curvature tau instead of a k, see `ThresholdSource`: where no gap
            is. Alignments are then norm(f(H) v) / norm(v), f a smooth step at tau.
        relative_to: unit of the threshold: the largest curvature seen; "edge": that at which the
            optimizer becomes unstable, such as 2 / lr; "one": that of the Hessian.
        samples: watch a random subset of so many samples of this process's, drawn once and held in
            memory; None for all of `data`.
        parameters: shell patterns of names, to watch a part of the model only.
        error, exact: as for `SubspaceTracker`; exact solves from scratch at every report, instead
            of only where following is no cheaper.
        mode: "train" for training mode, see `Objective`; `samples` counts batches then.
        seed: of the subset, of the tracker, and of random numbers that the loss draws, the same at
            each report; None for 0, and to refuse a loss that draws any.

    Raises:
        InvalidInput: no k is given and none can be inferred; the optimizer has none of the model's
            parameters; the file is there already; the loss, or one product with its Hessian, fails
            on a few samples, as where a layer has no second derivative; whatever `Objective` and
            `SubspaceTracker` refuse.
        Diverged: the loss is NaN or infinite from the start.

    Warns:
        WatchWarning: later, where a report or a sink fails. The training is not stopped, whatever
            the failure: see `Watcher`.
    """
    numbers = {
        "every": every,
        "quick_every": quick_every,
        "samples": samples,
        "k": k,
        "seed": seed,
        "resume_at": resume_at,
    }
    for name, number in numbers.items():
        if number is not None and (isinstance(number, bool) or not isinstance(number, Integral)):
            raise invalid(name, number, "an integer")
    for name, number in {"threshold": threshold, "error": error}.items():
        if number is not None and (isinstance(number, bool) or not isinstance(number, Real)):
            raise invalid(name, number, "a number")
    if not isinstance(model, nn.Module):
        raise invalid("model", type(model).__name__, "an nn.Module")
    if loss is not None and (not callable(loss) or isinstance(loss, type)):
        given = loss.__name__ if isinstance(loss, type) else loss
        hint = f"{given}()" if isinstance(loss, type) else ""
        raise invalid("loss", given, "a function loss(output, target), or None", hint)
    if (inside := unwrapped(model)) is not model:
        model, parameters = inside, patterns_inside(parameters)
    require_optimizer("optimizer", optimizer)
    refuse_unfit_shards(model)
    take_back(model)
    layout = _watched_layout(model, optimizer, parameters)
    watched = layout.parameters(model)
    with undisturbed(watched[0].device):
        reduction = reduction_of(group)
        with reduction.together():
            if samples is not None:
                data = _subset(data, samples, seed or 0, watched[0], mode)
        objective = Objective(
            model,
            loss,
            data,
            parameters=[glob.escape(name) for name in layout.names],
            batch_weight=batch_weight,
            chunk_size=chunk_size,
            mode=mode,
            seed=seed,
            group=None,
            reduction=reduction,
        )
        with (
            objective.reduction.together(),
            _on_one_line(
                objective,
                "the loss of the first samples cannot be evaluated",
                "loss(model(inputs), target) must work for `data` as it is given",
            ),
        ):
            classes = _number_of_classes(objective)
        _refuse_without_second_derivative(objective)
    if threshold is not None and k is not None:
        raise invalid("k", k, "None with a threshold")
    k = classes if k is None else k
    if k is None and threshold is None:
        raise invalid(
            "k",
            None,
            f"an integer from 1 to P = {objective.num_parameters}",
            "the model's output does not tell a number of classes up to"
            f" {MOST_INFERRED_CLASSES}: give k",
        )
    return _watching(
        objective,
        optimizer,
        k if threshold is None else (threshold, relative_to),
        error=error,
        exact=exact,
        seed=seed or 0,
        every=every,
        quick_every=quick_every,
        budget=budget,
        file=file,
        sinks=sinks,
        quiet=quiet,
        overwrite=overwrite,
        resume_at=resume_at,
        probes=probes,
    )


def watch_loss(
    objective: Loss,
    optimizer: Optimizer,
    *,
    k: int | None = None,
    threshold: float | None = None,
    relative_to: Literal["sharpness", "edge", "one"] = "sharpness",
    every: int | None = None,
    error: float = 0.01,
    exact: bool = False,
    seed: int = 0,
    **options: Any,
) -> Watcher:
    """The same as `watch` for a loss that is there already: a `WeightedSum`, a `FunctionLoss`.

    Args:
        objective: any `Loss`; its parameters are trained by the optimizer.
        optimizer, k, threshold, relative_to, every, error, exact: as for `watch`; k or a threshold
            is needed.
        seed: of the tracker.
        options: `quick_every`, `budget`, `file`, `sinks`, `quiet`, `overwrite`, `resume_at` and
            `probes` of `Watcher`.

    Raises:
        InvalidInput: the optimizer has none of the loss's parameters; the loss, or one product with
            its Hessian, fails on a few samples; whatever `SubspaceTracker` and `Watcher` refuse.

    Example:
        >>> import torch
        >>> from thalweg.loss.function_loss import FunctionLoss
        >>> theta = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> function = lambda t: t[0] ** 2 + 2 * t[1] ** 2
        >>> optimizer = torch.optim.SGD([theta], lr=0.1)
        >>> with watch_loss(FunctionLoss(function, theta), optimizer, k=1, quiet=True) as watcher:
        ...     function(theta).backward()
        ...     optimizer.step()
        >>> round(watcher.history[0]["sharpness"], 3)
        4.0
    """
    require_optimizer("optimizer", optimizer)
    held = held_by(optimizer)
    if not any(id(parameter) in held for parameter in objective.parameters()):
        raise InvalidInput("watch: the optimizer updates none of the parameters of the loss")
    for term in getattr(objective, "terms", ()):
        if type(reduction_in(term.loss)) is not Reduction:
            hint = "watch each term by itself"
            raise invalid("group", "a group in a sum", "None for each term", hint)
    with undisturbed(objective.device):
        _refuse_without_second_derivative(objective)
    if (k is None) == (threshold is None):
        raise invalid("k", k, "an integer, or None with a threshold")
    split_by = k if threshold is None else (threshold, relative_to)
    return _watching(
        objective, optimizer, split_by, error=error, exact=exact, seed=seed, every=every, **options
    )


def _watching(
    objective: Loss,
    optimizer: Optimizer,
    split_by: int | tuple[float, str] | None,
    *,
    error: float,
    exact: bool,
    seed: int,
    quiet: bool = False,
    **options: Any,
) -> Watcher:
    source: SubspaceSource
    if isinstance(split_by, tuple):
        source = _threshold_source(objective, optimizer, *split_by, error=error, seed=seed)
    else:
        assert split_by is not None
        source = SubspaceTracker(objective, split_by, error=error, exact=exact, seed=seed)
    # Of the outermost that is known around it.
    note = stability_threshold(stepping(optimizer)[-1], objective.parameters()).note
    if note and not quiet and reduction_in(objective).rank == 0:
        say_if_possible(f"thalweg.watch: {note}")
    return Watcher(objective, source, optimizer, quiet=quiet, **options)


def _threshold_source(
    objective: Loss,
    optimizer: Optimizer,
    threshold: float,
    relative_to: str,
    *,
    error: float,
    seed: int,
) -> ThresholdSource:
    """A split at a threshold in the unit that is asked for, Euclidean.

    Raises:
        InvalidInput: an unknown unit; the edge of an optimizer that has none, or one in a metric.
    """
    if relative_to not in UNITS:
        raise unknown_name("relative_to", relative_to, UNITS)
    relative = relative_to == "sharpness"
    source = ThresholdSource(objective, threshold, relative=relative, error=error, seed=seed)
    if relative_to == "edge":
        outermost = stepping(optimizer)[-1]
        if stability_threshold(outermost, objective.parameters()).preconditioned:
            hint = f"the edge of {type(outermost).__name__} is in its own metric"
            raise invalid("relative_to", relative_to, "'sharpness' or 'one' here", hint)
        source.ask(edge_of_stability(outermost, threshold))
    return source


def _watched_layout(
    model: nn.Module, optimizer: Optimizer, patterns: Sequence[str] | str | None
) -> ParameterLayout:
    """The model's parameters that match, and that the optimizer updates."""
    layout = ParameterLayout.from_model(model, patterns)
    held = held_by(optimizer)
    named = zip(layout.names, layout.parameters(model), strict=True)
    found = {name: parameter.shape for name, parameter in named if id(parameter) in held}
    if not found:
        raise InvalidInput(
            "watch: the optimizer updates none of these parameters of the model; build both of one"
            " model"
        )
    return ParameterLayout(tuple(found), tuple(found.values()))


def _subset(data: object, samples: int, seed: int, like: Tensor, mode: str) -> object:
    """So many samples, drawn without replacement, as batches that are read once."""
    everything = as_samples(data, like, whole=mode == "train")
    if not 1 <= samples <= len(everything):
        raise invalid("samples", samples, f"an integer from 1 to N = {len(everything)}")
    generator = torch.Generator().manual_seed(seed)
    drawn = (
        torch.randperm(len(everything), generator=generator, device="cpu")[:samples].sort().values
    )
    batches = [batch for batch, _ in everything.chunks(drawn, None)]
    # A list of batches says that they are not to be cut.
    return batches if len(batches) > 1 or are_whole(everything) else TensorSamples(batches[0], like)


def _few_that_count(loss: Loss) -> Tensor:
    """The first samples; more of them where the loss ignores all targets of those."""
    few = min(SAMPLES_CHECKED, loss.num_samples)
    if getattr(loss, "batch_weight", None) is not None:
        while few < loss.num_samples and not _counts(loss, few):
            few = min(2 * few, loss.num_samples)
    return torch.arange(few, device="cpu")


def _counts(loss: Any, few: int) -> bool:
    try:
        return loss.weight(torch.arange(few, device="cpu")) > 0
    except InvalidInput:
        return False


def _number_of_classes(objective: Objective) -> int | None:
    """By the shape of the model's output; evaluating the loss also shows early what is wrong."""
    alone, outputs = objective.unchecked(), []
    # Of this process, which may hold fewer than others.
    few = _few_that_count(alone)
    if isinstance(objective.model, torch.jit.ScriptModule):  # takes no hooks
        outputs = list(next(alone.evaluations(samples=few)).outputs)
    else:
        hook = objective.model.register_forward_hook(lambda *call: outputs.append(call[2]))
        try:
            alone.value(samples=few)
        finally:
            hook.remove()
    output = outputs[-1] if outputs else None
    if isinstance(output, Mapping):
        output = output.get("logits")
    output = getattr(output, "logits", output)
    if not isinstance(output, Tensor) or output.dim() != 2:
        return None
    classes = output.shape[1]
    return min(classes, objective.num_parameters) if 2 <= classes <= MOST_INFERRED_CLASSES else None


def _refuse_without_second_derivative(objective: Loss) -> None:
    """One product over a few samples: what fails always is told here, not in the first step."""
    kind = {"dtype": objective.dtype, "device": objective.device}
    try:
        torch.linalg.qr(torch.ones(2, 1, **kind))
    except RuntimeError:
        raise invalid(
            "dtype of the parameters",
            objective.dtype,
            "torch.float32 or torch.float64",
            "keep the parameters in float32, and train in lower precision by torch.autocast",
        ) from None
    few = _few_that_count(objective)
    # What fits these few chunks, such as the faster way to multiply, is not known of the others.
    known = objective.state_dict()
    try:
        with _on_one_line(objective, "products with the Hessian fail", TWICE):
            hessian = Hessian(objective, samples=few)
            _ = hessian @ hessian.gradient
    except (Diverged, MemoryError, torch.OutOfMemoryError):
        # It may pass; where it does not, the reports say so.
        pass
    finally:
        objective.load_state_dict(known)


@contextmanager
def _on_one_line(objective: Loss, what: str, hint: str) -> Iterator[None]:
    """Errors of torch or of the user's own code, in the words of a refusal."""
    try:
        yield
    except (ThalwegError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        explain = getattr(objective, "explained", lambda error: None)
        explained = explain(error) or f"{reason_of(error)}; {hint}"
        raise InvalidInput(f"watch: {what}: {explained}") from error
