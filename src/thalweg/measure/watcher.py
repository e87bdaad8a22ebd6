"""The reports of a watched training: a `Watcher` acts through the hooks of its optimizer.

At every n-th step of an optimizer a `Watcher` reports sharpness and stability threshold, how much
of the gradient and of the update lies in the dominant subspace, and the effective learning rate of
either part, to the sinks that it was given. The training is bit for bit what it is without. `watch`
builds one; with an objective and a source of one's own:

Example:
    >>> import torch
    >>> from thalweg.loss.objective import Objective
    >>> from thalweg.tracking.tracker import SubspaceTracker
    >>> inputs, targets = torch.randn(64, 3) * torch.tensor([3.0, 1.0, 1.0]), torch.randn(64, 2)
    >>> model, loss = torch.nn.Linear(3, 2), torch.nn.MSELoss()
    >>> objective = Objective(model, loss, (inputs, targets))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    >>> source = SubspaceTracker(objective, k=2)
    >>> with Watcher(objective, source, optimizer, every=2, quiet=True) as watcher:
    ...     for step in range(3):
    ...         optimizer.zero_grad()
    ...         loss(model(inputs), targets).backward()
    ...         optimizer.step()
    >>> watcher
    Watcher(closed, every=2, step=3, reports=2)
    >>> watcher.history[0]["stability_threshold"]
    200.0
"""

from __future__ import annotations

import itertools
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from thalweg import registry
from thalweg.errors import Diverged, InvalidInput, invalid
from thalweg.loss.protocol import Loss
from thalweg.measure.effective_learning_rate import effective_learning_rate
from thalweg.measure.preconditioned_sharpness import preconditioned_sharpness
from thalweg.measure.sinks import CONSOLE_COLUMNS, CSV, Console, History, Sink, Sinks, warn
from thalweg.measure.step_state import StepState
from thalweg.optim.stability import stability_threshold
from thalweg.tracking.source import SubspaceSource

MEASURED = (
    "loss",
    "sharpness",
    "alignment_gradient",
    "alignment_minibatch",
    "alignment_update",
    "effective_learning_rates",
    "subspace_cost",
)
"""The probes that a report asks."""

COLUMNS = (
    "step",
    "learning_rate",
    "loss",
    "sharpness",
    "lr_sharpness",
    "preconditioned_sharpness",
    "stability_threshold",
    "alignment_gradient",
    "alignment_minibatch",
    "alignment_update",
    *registry.probes["effective_learning_rates"].columns,
    "subspace_error",
    "subspace_gradients",
    "seconds",
)
"""The keys of a report: columns of the file, and keys of each row of `Watcher.history`.

Those that are not plain: `learning_rate` is the largest of the parameter groups; `lr_sharpness` is
that times lambda_1; `stability_threshold` is to be compared with `sharpness`, or with
`preconditioned_sharpness` where that is given, in the metric of the step reported;
`alignment_*` is chi_k of the full gradient, of the gradient that the optimizer was given (clipped,
accumulated), and of the update it made; `effective_lr_*` is a ratio of sums over the last
`WINDOW` reports, whose terms are the `lr_numerator_*` and `lr_denominator_*`; `subspace_error` is
the tracker's estimate of the error of the full gradient's dominant part, relative to the gradient;
`subspace_gradients` is what the subspace cost, in gradients of the loss over the watched data, the
one gradient that each report takes not included; `seconds` is what the whole report took.
"""

# A single step's ratio is ruled by the noise of its mini-batch.
WINDOW = 10


class Watcher:
    """Reports on every n-th step of an optimizer, until it is closed.

    It acts through the optimizer's own hooks. The subspace, the loss and its gradient are those of
    theta before the step. A step without a report costs the check of a counter. Steps that are
    never made, such as those that a gradient scaler skips, are not counted. A context manager,
    closed at its end.

    Args:
        objective: the loss, over the data that is watched.
        source: gives the dominant subspace; usually a `SubspaceTracker` of the objective.
        optimizer: whose steps are watched.
        every: report at steps 0, every, 2 every, ...
        file: CSV file for the rows, one a report; None for `history` alone.
        sinks: where else the rows go, see `Sinks`; closed with the watcher.
        quiet: write nothing to the console (standard error).
        overwrite: replace the file, if it is there.
        resume_at: for a resumed training, the number of its next optimizer step: steps count from
            there, and a file that is there is continued.

    Attributes:
        history: one dict a report, keys `COLUMNS`; `pandas.DataFrame(watcher.history)`.
        step: the number of the next step.

    Raises:
        InvalidInput: a number out of its range; the file is there already, or has other columns;
            something that is no sink.
    """

    def __init__(
        self,
        objective: Loss,
        source: SubspaceSource,
        optimizer: Optimizer,
        *,
        every: int = 50,
        file: str | os.PathLike[str] | None = None,
        sinks: Iterable[Sink | str | Callable[[Any, int], Any]] = (),
        quiet: bool = False,
        overwrite: bool = False,
        resume_at: int | None = None,
    ) -> None:
        if every < 1:
            raise invalid("every", every, "an integer >= 1")
        if resume_at is not None and resume_at < 0:
            raise invalid("resume_at", resume_at, "an integer >= 0")
        self.objective = objective
        self.source = source
        self.optimizer = optimizer
        self.every = every
        self.quiet = quiet
        self.step = resume_at or 0
        history = History()
        self.history: list[dict[str, Any]] = history.rows
        self._parameters = objective.parameters()
        self._state: StepState | None = None
        self._seconds = 0.0
        self._direction: Tensor | None = None
        preconditioned = stability_threshold(optimizer, self._parameters).preconditioned
        hidden = set() if preconditioned else {"preconditioned_sharpness"}
        # The file last, so that none is made where something else is refused.
        self._sinks = Sinks(sinks)
        own: list[Sink] = [history]
        if not (quiet or any(isinstance(sink, Console) for sink in self._sinks.sinks)):
            own.append(Console([column for column in CONSOLE_COLUMNS if column not in hidden]))
        if file is not None:
            own.append(CSV(file, COLUMNS, overwrite=overwrite, resume_at=resume_at))
        self._sinks.sinks[:0] = own
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def close(self) -> None:
        """Stop watching and close the sinks; `history` stays. To close twice does nothing."""
        while self._hooks:
            self._hooks.pop().remove()
        self._state = None
        with undisturbed(self.objective.device):
            self._sinks.close()

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        now = "watching" if self._hooks else "closed"
        return f"Watcher({now}, every={self.every}, step={self.step}, reports={len(self.history)})"

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self.step % self.every:
            return None
        begin = time.perf_counter()
        with undisturbed(self.objective.device):
            state = StepState(
                step=self.step,
                theta=self.objective.theta(),
                objective=self.objective,
                source=self.source,
                learning_rate=max(
                    float(group.get("lr", math.nan)) for group in optimizer.param_groups
                ),
            )
            try:
                # The gradient first: the subspace's error is measured by it.
                _ = state.gradient, state.subspace
            except Diverged as error:
                self._state = None
                self._report({"step": self.step, "learning_rate": state.learning_rate})
                warn(f"step {self.step}: {error}; this report is empty")
                return None
        self._state = state
        self._seconds = time.perf_counter() - begin
        return self._observe_gradient(state, args, kwargs)

    def _observe_gradient(
        self, state: StepState, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Note the mini-batch gradient: it is there already, or after a closure's first call."""
        optimizer, *rest = args
        closure = kwargs.get("closure", rest[0] if rest else None)
        if closure is None:
            state.minibatch_gradient = self._minibatch_gradient()
            return None
        calls = itertools.count()

        def observed() -> Any:
            result = closure()
            if next(calls) == 0:
                state.minibatch_gradient = self._minibatch_gradient()
            return result

        if rest:
            return (optimizer, observed, *rest[1:]), kwargs
        return args, kwargs | {"closure": observed}

    def _after_step(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        self.step += 1
        state, self._state = self._state, None
        if state is None:
            return
        begin = time.perf_counter()
        with undisturbed(self.objective.device):
            state.update = state.proposed = self.objective.theta() - state.theta
            row: dict[str, Any] = {"step": state.step, "learning_rate": state.learning_rate}
            for name in MEASURED:
                row.update(registry.probes[name].measure(state))
            threshold = stability_threshold(optimizer, self._parameters)
            row["stability_threshold"] = threshold.value
            if threshold.preconditioned:
                row["preconditioned_sharpness"] = self._preconditioned_sharpness(state)
        row["seconds"] = self._seconds + time.perf_counter() - begin
        self._report(row)

    def _preconditioned_sharpness(self, state: StepState) -> float | None:
        try:
            found = preconditioned_sharpness(
                self.objective, self.optimizer, state.theta, start=self._direction
            )
        except (InvalidInput, Diverged) as error:
            warn(f"no preconditioned sharpness: {error}")
            return None
        self._direction = found.basis[:, 0]
        return float(found.eigenvalues[0])

    def _report(self, measured: Mapping[str, Any]) -> None:
        row: dict[str, Any] = {column: measured.get(column) for column in COLUMNS}
        recent = [*self.history[1 - WINDOW :], row]
        for part in ("dominant", "bulk"):
            numerators, denominators = (
                [report[f"lr_{side}_{part}"] for report in recent]
                for side in ("numerator", "denominator")
            )
            rate = effective_learning_rate(numerators, denominators)
            row[f"effective_lr_{part}"] = rate if math.isfinite(rate) else None
        # Sinks may draw random numbers too, as for the name of a run.
        with undisturbed(self.objective.device):
            self._sinks.log(row, measured["step"])

    def _minibatch_gradient(self) -> Tensor | None:
        """The gradient that the optimizer is about to use, (P,); None where there is none."""
        gradients = [parameter.grad for parameter in self._parameters]
        if all(gradient is None for gradient in gradients):
            return None
        dense = [
            torch.zeros_like(p) if g is None else g.detach().to_dense().to(p.dtype)
            for p, g in zip(self._parameters, gradients, strict=True)
        ]
        return torch.cat([part.reshape(-1) for part in dense])


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Put the random generators of Python, NumPy and torch back, whatever the block drew.

    The block runs in the precision of its tensors, also within the user's `torch.autocast`.

    Args:
        device: whose generator is put back besides that of the CPU.

    Example:
        >>> state = random.getstate()
        >>> with undisturbed(torch.device("cpu")):
        ...     _ = random.random(), torch.rand(1)
        >>> random.getstate() == state
        True
    """
    python_state = random.getstate()
    # The engine needs torch alone: where NumPy was never imported nobody has drawn from it.
    numpy = sys.modules.get("numpy")
    numpy_state = None if numpy is None else numpy.random.get_state()
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), torch.autocast(device.type, enabled=False):
            yield
    finally:
        random.setstate(python_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)
