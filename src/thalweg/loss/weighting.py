"""What a loss averages over: samples, unless it is known to weigh targets unequally.

The mean over a data set in chunks is right only if every chunk enters with the weight by which
its own mean was divided. `nn.CrossEntropyLoss(weight=w)` divides by the sum of w over the targets,
one with `ignore_index` by the number of targets that are left.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from thalweg.errors import invalid
from thalweg.loss.compute_loss import ComputeLoss
from thalweg.loss.samples import Batch

TARGET_NAMES = ("labels", "label", "target", "targets")


def batch_weight_of(loss: object) -> Callable[[Batch], Tensor] | None:
    """The weight of a batch for the losses of torch; None where it is the number of samples.

    Known are the modules of `torch.nn`, the functions of `torch.nn.functional`, and
    `functools.partial` of these.

    Raises:
        InvalidInput: a loss with reduction "sum" or "none", which is not a mean.
    """
    function, options = _settings(loss)
    reduction = options.get("reduction", "mean")
    if reduction not in ("mean", "batchmean"):
        name = getattr(function, "__name__", type(function).__name__)
        raise invalid("loss", f"{name}(reduction={reduction!r})", "reduction='mean'")
    if not (
        isinstance(function, (nn.CrossEntropyLoss, nn.NLLLoss))
        or function in (functional.cross_entropy, functional.nll_loss)
    ):
        return None
    class_weights: Tensor | None = options.get("weight")
    ignored: int = options.get("ignore_index", -100)

    def weight(batch: Batch) -> Tensor:
        target = target_of(batch)
        if target.is_floating_point():
            # Class probabilities (n, classes, ...): torch divides by the number of distributions.
            classes = target.shape[1] if target.dim() > 1 else 1
            return torch.tensor(float(target.numel() // classes), device="cpu")
        # Without picking targets out, so that `vmap` weighs many batches at once.
        kept = target != ignored
        if class_weights is None:
            return kept.sum()
        weights = class_weights.to(target.device)[torch.where(kept, target, 0)]
        return torch.where(kept, weights, 0).sum()

    return weight


@dataclass(frozen=True)
class Counted:
    """A weight of a batch: how many entries of one of its tensors count, such as kept targets.

    Attributes:
        entry: the name of the tensor in a dict batch, or its place in a tuple; None counts samples.
        ignored: the value of entries that do not count; None where non-zero ones count.
        shifted: leave out each sample's first entry: a causal language model predicts the next.
    """

    entry: str | int | None = None
    ignored: int | None = None
    shifted: bool = False

    def of_each(self, batch: Batch) -> Tensor:
        """The weight of each of a batch's samples, int64 (n,)."""
        if self.entry is None:
            first = next(leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))
            return torch.ones(len(first), dtype=torch.int64, device="cpu")
        tensor = batch[self.entry]
        counts = tensor != (0 if self.ignored is None else self.ignored)
        counts = counts.reshape(len(tensor), -1)
        return (counts[:, 1:] if self.shifted else counts).sum(1)

    def __call__(self, batch: Batch) -> Tensor:
        """The weight of a batch, a number."""
        return self.of_each(batch).sum()

    def __str__(self) -> str:
        if self.entry is None:
            return "samples"
        what = f"{self.entry!r} that are not {self.ignored or 0}"
        return f"{what}, the first of each sample left out" if self.shifted else what


# What libraries take for a target that does not count, the usual one first.
IGNORED = (-100, -1, 0)
MASK_NAMES = ("attention_mask", "loss_mask", "mask")


def candidates(batch: Batch) -> list[Counted]:
    """What a loss of the user's may divide by, likeliest first: to be tried on the data.

    Samples; the targets that are not ignored, where targets are integers; the same without each
    sample's first; the entries of a mask.
    """
    found = [Counted()]
    named = isinstance(batch, Mapping)
    place = next((n for n in TARGET_NAMES if n in batch), None) if named else len(batch) - 1
    places: list[tuple[Any, tuple[int | None, ...]]] = [(place, IGNORED)]
    places += [(name, (None,)) for name in MASK_NAMES if named and name in batch]
    for entry, values in places:
        tensor = None if entry is None else batch[entry]
        if not isinstance(tensor, Tensor) or tensor.is_floating_point() or tensor.dim() < 1:
            continue
        for value in values:
            found.append(Counted(entry, value))
            if tensor.dim() > 1:
                found.append(Counted(entry, value, shifted=True))
    return found


def refuse_unfit_batch(batch: Batch, model: nn.Module, loss: object) -> None:
    """Raise where a batch does not fit model and loss, before torch or Python fail inside.

    Raises:
        InvalidInput: a loss of torch gets no target, or one that is no tensor; the model does not
            take an entry of a dict batch.
    """
    if isinstance(loss, ComputeLoss):
        return
    of_torch = loss is not None and is_torch_loss(loss)
    if of_torch:
        target = target_of(batch)
        if not isinstance(target, Tensor):
            kind = type(target).__name__
            given = f"a {kind} of {len(target)}" if isinstance(target, (tuple, list)) else kind
            name, _ = _settings(loss)
            name = getattr(name, "__name__", type(name).__name__)
            raise invalid(
                "data: the target, the last of a batch"
                if not isinstance(batch, Mapping)
                else f"data: the target {target_name(batch)!r}",
                given,
                f"a tensor, for {name}",
                "give a loss of your own that takes it: loss(output, target)",
            )
    if not isinstance(batch, Mapping):
        return
    named = {name for name in batch if not (of_torch and name == _name_of_target(batch))}
    taken = _keywords_of(model)
    unknown = [name for name in batch if name in named and taken is not None and name not in taken]
    if unknown:
        raise invalid(
            "data",
            f"entries {', '.join(map(repr, unknown))}",
            f"what {type(model).__name__}.forward takes: {', '.join(sorted(taken or ()))}",
            "drop them (remove_columns of a data set), or let forward take **kwargs",
        )


def _keywords_of(model: nn.Module) -> set[str] | None:
    """The names that a model takes as keywords; None where it takes any, or nobody knows."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind == p.VAR_KEYWORD for p in parameters) or model._forward_pre_hooks:
        return None
    return {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def _name_of_target(batch: Mapping[str, Any]) -> str | None:
    return next((name for name in TARGET_NAMES if name in batch), None)


def is_torch_loss(loss: object) -> bool:
    """Whether it takes (output, target): a loss of `torch.nn`, or one of its functions."""
    function, _ = _settings(loss)
    module = getattr(function, "__module__", "")
    return isinstance(function, nn.modules.loss._Loss) or module == functional.__name__


def target_of(batch: Batch) -> Tensor:
    """What a loss of torch compares the output with: the last part, or the entry of that name."""
    if isinstance(batch, Mapping):
        return batch[target_name(batch)]
    return batch[-1]


def target_name(batch: Mapping[str, Any]) -> str:
    """The key of the target in a dict batch."""
    name = _name_of_target(batch)
    if name is None:
        raise invalid("batch", list(batch), "a 'labels' or 'target' entry", "or pass batch_weight")
    return name


def _settings(loss: object) -> tuple[object, dict[str, Any]]:
    """The module or function, and its options that decide what it averages over."""
    if isinstance(loss, functools.partial):
        function, options = _settings(loss.func)
        return function, options | loss.keywords
    if isinstance(loss, nn.Module):
        names = ("reduction", "weight", "ignore_index")
        return loss, {name: getattr(loss, name) for name in names if hasattr(loss, name)}
    return loss, {}
