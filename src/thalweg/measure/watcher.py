"""The reports of a watched training: a `Watcher` acts through the hooks of its optimizer.

At every n-th step of an optimizer, or as often as a budget allows, a `Watcher` reports sharpness
and stability threshold, how much of the gradient and of the update lies in the dominant subspace,
and the effective learning rate of either part, to the sinks that it was given. The training is bit
for bit what it is without, also where a report fails: that is a row which says why. `watch` builds
one; with an objective and a source of one's own:

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

import contextlib
import copy
import functools
import gc
import itertools
import math
import os
import random
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.nn import Module
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from thalweg import registry
from thalweg.errors import InvalidInput, invalid, require_extra
from thalweg.loss.cost import PARTS, cost_of
from thalweg.loss.guards.memory import is_out_of_memory
from thalweg.loss.layout import flat
from thalweg.loss.protocol import Loss
from thalweg.loss.reduce import reduction_in
from thalweg.loss.samples import are_whole
from thalweg.loss.shards import sharding_of_parameters
from thalweg.measure.agreement import all_or_none
from thalweg.measure.curvature_shares import alignments_above
from thalweg.measure.effective_learning_rate import effective_learning_rate
from thalweg.measure.preconditioned_sharpness import preconditioned_sharpness
from thalweg.measure.report_spacing import ReportSpacing
from thalweg.measure.sinks import (
    CONSOLE_COLUMNS,
    CSV,
    Console,
    History,
    Sink,
    Sinks,
    reason_of,
    say_if_possible,
    warn,
    warnings_that_stop_nothing,
)
from thalweg.measure.stability_probes import threshold_at
from thalweg.measure.step_state import StepState
from thalweg.measure.training_samples import TrainingSamples
from thalweg.optim.stability import stability_threshold
from thalweg.representation import as_html
from thalweg.sharding import packed, sharding_of, unpacked
from thalweg.spectrum.subspace import Subspace
from thalweg.tracking.source import SubspaceSource
from thalweg.tracking.wrapping import held_by, stepping

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
    "stability_margin",
    "eigenvalues",
    "alignment_gradient",
    "alignment_minibatch",
    "alignment_update",
    *registry.probes["effective_learning_rates"].columns,
    "subspace_error",
    "subspace_gradients",
    "report_gradients",
    "overhead",
    "seconds",
    "caveat",
    "failure",
)
"""The keys of a report: columns of the file, and keys of each row of `Watcher.history`.

Those that are not plain: `learning_rate` is the largest of the parameter groups that hold watched
parameters; `lr_sharpness` is
that times lambda_1; `stability_threshold` is to be compared with `sharpness`, or with
`preconditioned_sharpness` where that is given, in the metric of the step reported, and
`stability_margin` is 1 minus their ratio: below 0 the optimizer is beyond its edge of stability;
`eigenvalues` are lambda_1 to lambda_k;
`alignment_*` is chi_k of the full gradient, of the gradient that the optimizer was given (clipped,
accumulated), and of the update it made; `effective_lr_*` is a ratio of sums over the last
`WINDOW` reports, whose terms are the `lr_numerator_*` and `lr_denominator_*`; `subspace_error` is
the tracker's estimate of the error of the full gradient's dominant part, relative to the gradient;
`subspace_gradients` is what the subspace cost, in gradients of the loss over the watched data, the
one gradient that each report takes not included; `report_gradients` is what the whole report cost,
probes included, in the same unit; `overhead` what all reports have cost, as a part of the training
so far, None where its samples are not seen; `seconds` is what the whole report took; `caveat` is
None, or a text: why a value is NaN, or why the subspace is not to be trusted: its target was
missed, or it is ill defined at this k. Then alignments are square roots of the shares above
lambda_k, which need no gap (see `curvature_profile`), and the text says so; `failure` is None, or
a text that says why the columns that are None could not be measured.
"""

# A single step's ratio is ruled by the noise of its mini-batch.
WINDOW = 10

# Failed reports in a row after which no more are made: what failed so often is not passing, and
# each takes time.
MOST_FAILURES = 3


class Watcher:
    """Reports on steps of an optimizer, until it is closed.

    It acts through the optimizer's own hooks. The subspace, the loss and its gradient are those of
    theta before the step. A step without a report costs the check of a counter. Steps that are
    never made, such as those that a gradient scaler skips, are not counted. A context manager,
    closed at its end.

    What is reported is what happens to the parameters: where one of Thalweg's optimizers wraps the
    given one, now or later, the step is that of the wrapper if that is called, from its beginning
    to its end. Wrappers of other libraries are looked through inwards (Accelerate's, Lightning's);
    of those around the given optimizer, hand over the outermost.

    Nothing that goes wrong in a report reaches the training (`KeyboardInterrupt` does): it is a
    `WatchWarning`, and a row whose `failure` says why. The next report is tried, its subspace
    solved from scratch, and after three failures in a row reports end. Warnings of a report that
    the user turned into errors go to standard error.

    Processes that share the samples skip a report together, see `agreement.py`; the first of them
    alone writes: the others have `history`, and no console, file or sinks.

    Args:
        objective: the loss, over the data that is watched.
        source: gives the dominant subspace; usually a `SubspaceTracker` of the objective.
        optimizer: whose steps are watched, or a wrapper.
        every: report at steps 0, every, 2 every, ..., whatever it costs; None for as often as
            `budget` allows.
        budget: the most that reports may cost, as a part of what the training costs, see
            `ReportSpacing`: the first one, at step 0, is paid for before the next is made. Where
            the samples of a training step are not seen (a compiled model, a loss without a model)
            reports are `report_spacing.EVERY` steps apart.
        file: CSV file for the rows, one a report; None for `history` alone.
        sinks: where else the rows go, see `Sinks`; closed with the watcher.
        quiet: write nothing to the console (standard error).
        overwrite: replace the file, if it is there.
        resume_at: for a resumed training, the number of its next optimizer step: steps count from
            there, and a file that is there is continued.
        probes: what else a report asks, by name, such as "curvature_shares"; their columns follow
            `COLUMNS`.

    Attributes:
        history: one dict a report, keys `COLUMNS`; `pandas.DataFrame(watcher.history)`.
        step: the number of the next step.
        spacing: when reports are made: a `ReportSpacing`.

    Raises:
        InvalidInput: a number out of its range; the file is there already, or has other columns;
            something that is no sink; an optimizer whose steps cannot be seen.
    """

    def __init__(
        self,
        objective: Loss,
        source: SubspaceSource,
        optimizer: Optimizer,
        *,
        every: int | None = None,
        budget: float = 0.05,
        file: str | os.PathLike[str] | None = None,
        sinks: Iterable[Sink | str | Callable[[Any, int], Any]] = (),
        quiet: bool = False,
        overwrite: bool = False,
        resume_at: int | None = None,
        probes: Sequence[str] = (),
    ) -> None:
        if resume_at is not None and resume_at < 0:
            raise invalid("resume_at", resume_at, "an integer >= 0")
        self.objective = objective
        self.source = source
        self.optimizer = optimizer
        reduction = reduction_in(objective)
        self._leads = reduction.rank == 0
        start = resume_at or 0
        self.spacing = ReportSpacing(every, budget, begin=start, next_step=start)
        self._trained = TrainingSamples(_models_of(objective), whole=_is_whole(objective))
        self.quiet = quiet = quiet or not self._leads
        self.step = start
        history = History()
        self.history: list[dict[str, Any]] = history.rows
        self._probes = [registry.probes.find(name) for name in probes]
        further = [column for probe in self._probes for column in probe.columns]
        self._columns = (*COLUMNS, *(column for column in further if column not in COLUMNS))
        self._parameters = list(objective.parameters())
        self._held = held_by(optimizer)
        self._kind = objective.device, objective.dtype
        self._fresh = _fresh_state(source)
        self._failures = 0
        self._closed = False
        self._recent: deque[dict[str, Any]] = deque(maxlen=WINDOW)
        self._state: StepState | None = None
        self._seconds = 0.0
        self._spent = 0
        self._direction: Tensor | None = None
        watched = stepping(optimizer)
        preconditioned = any(
            stability_threshold(each, self._parameters).preconditioned for each in watched
        )
        hidden = set() if preconditioned else {"preconditioned_sharpness"}
        with reduction.together():
            self._sinks = Sinks(sinks if self._leads else ())
            own: list[Sink] = [history]
            if not (quiet or any(isinstance(sink, Console) for sink in self._sinks.sinks)):
                own.append(Console([column for column in CONSOLE_COLUMNS if column not in hidden]))
            # Last, so that none is made where something else is refused.
            if file is not None and self._leads:
                own.append(CSV(file, self._columns, overwrite=overwrite, resume_at=resume_at))
        self._sinks.sinks[:0] = own
        # Of a wrapped optimizer's step and that of what is in it, the first to begin counts.
        self._stepping: Optimizer | None = None
        self._inside: WeakSet[Optimizer] = WeakSet()
        self._followed: WeakSet[Optimizer] = WeakSet()
        self._hooks: list[RemovableHandle] = []
        for each in watched:
            self._hook(each)

    def follow(self, optimizer: Optimizer) -> None:
        """Watch the steps of another optimizer too, one that wraps the watched one.

        Wrappers of Thalweg call this when they are built.
        """
        if not self._closed and optimizer not in self._followed:
            self._hook(optimizer)

    def _hook(self, optimizer: Optimizer) -> None:
        self._followed.add(optimizer)
        self._hooks += [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    @property
    def every(self) -> int | None:
        """Steps from one report to the next; None where a budget spaces them."""
        return self.spacing.every

    @property
    def ended(self) -> bool:
        """Whether reports have ended, since `MOST_FAILURES` failed in a row."""
        return self._failures >= MOST_FAILURES

    def close(self) -> None:
        """Stop watching and close the sinks; `history` stays. To close twice does nothing."""
        self._closed = True
        self._state = None
        self._trained.close()
        # A sink may close a watcher: the optimizer is going through its hooks at that moment, and
        # those of a closed one do nothing.
        while self._hooks and not _hooks_at_work:
            self._hooks.pop().remove()
        with undisturbed(self._device()):
            self._sinks.close()

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on bit for bit: steps, spacing, subspace, recent reports.

        For a checkpoint of a training that is to be resumed; `history` is not in it. Numbers, texts
        and tensors, in dicts and lists; of a model in shards this process's part, see `Sharding`.
        """
        return {
            "step": self.step,
            "spacing": self.spacing.state_dict(),
            "trained": self._trained.samples,
            "source": self.source.state_dict(),
            "direction": packed(self._direction),
            "failures": self._failures,
            "recent": [row.copy() for row in self._recent],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave, into a watcher of the same loss and optimizer."""
        self.step, self._failures = state["step"], state["failures"]
        self.spacing.load_state_dict(state["spacing"])
        self._trained.samples = state["trained"]
        self.source.load_state_dict(state["source"])
        self._direction = unpacked(state["direction"], sharding_of(self.objective))
        self._recent.clear()
        self._recent.extend(dict(row) for row in state["recent"])

    def plot(self) -> Any:
        """Draw what was reported: a matplotlib figure, `watcher.plot().savefig("run.png")`.

        Loss, sharpness beside its limit, alignments; with the probe "curvature_shares" also where
        gradient and update lie in the spectrum.

        Raises:
            InvalidInput: nothing was reported yet.
            MissingExtra: matplotlib is not installed.
        """
        # By its name: the engine needs torch alone.
        return import_module("thalweg.integrations.watch_plot").draw(self.history)

    def frame(self) -> Any:
        """What was reported as a pandas data frame: a row for each report, its step the index.

        Raises:
            MissingExtra: pandas is not installed.
        """
        require_extra("lab", "pandas")
        pandas = import_module("pandas")
        rows = pandas.DataFrame(self.history)
        return rows.set_index("step") if self.history else rows

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        now = "closed" if self._closed else "ended" if self.ended else "watching"
        reports = len(self.history)
        return f"Watcher({now}, every={self.every}, step={self.step}, reports={reports})"

    def _repr_html_(self) -> str:
        """The last report as a table, for a notebook."""
        last = self.history[-1] if self.history else {}
        rows = [[key, _shown(value)] for key, value in last.items() if value is not None]
        return as_html((repr(self), ["", ""], rows))

    # A compiled `step` breaks off for the hooks, as torch's own optimizers do for `zero_grad`: a
    # report that is traced fails, and the step compiled with it differs in the last bits.
    @_disable_dynamo
    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # One that begins within another's step again: that of the other has failed.
        if self._stepping not in (None, optimizer) and optimizer not in self._inside:
            self._inside.add(optimizer)
            return None
        self._stepping = optimizer
        self._inside.clear()
        self._state = None
        if self._closed or self.ended or not self.spacing.is_due(self.step):
            return None
        begin = time.perf_counter()
        row: dict[str, Any] = {"step": self.step}
        states: list[StepState] = []

        def measure() -> None:
            row["learning_rate"] = self._learning_rate(optimizer)
            self._refuse_other_parameters(optimizer)
            self._begin_anew_elsewhere()
            state = StepState(
                step=self.step,
                theta=self.objective.theta(),
                objective=self.objective,
                source=self.source,
                learning_rate=row["learning_rate"],
                optimizer=optimizer,
            )
            # The gradient first: the subspace's error is measured by it.
            _ = state.gradient, state.subspace
            states.append(state)

        if reason := self._failure_of(measure, row, "empty"):
            self._report(row | {"failure": reason})
            return None
        self._state = states.pop()
        self._seconds = time.perf_counter() - begin
        return self._observe_gradient(self._state, args, kwargs)

    def _observe_gradient(
        self, state: StepState, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Note the mini-batch gradient: it is there already, or after a closure's first call."""
        optimizer, *rest = args
        closure = kwargs.get("closure", rest[0] if rest else None)
        # Some optimizers are given other things, such as a loss or a model.
        if not callable(closure) or isinstance(closure, (type, torch.nn.Module)):
            self._note_minibatch_gradient(state)
            return None
        calls = itertools.count()

        @functools.wraps(closure)
        def observed(*arguments: Any, **keywords: Any) -> Any:
            result = closure(*arguments, **keywords)
            if next(calls) == 0:
                self._note_minibatch_gradient(state)
            return result

        if "closure" in kwargs:
            return args, kwargs | {"closure": observed}
        return (optimizer, observed, *rest[1:]), kwargs

    def _note_minibatch_gradient(self, state: StepState) -> None:
        """Keep it with the state; one that cannot be read counts as none."""
        with contextlib.suppress(Exception):
            state.minibatch_gradient = self._minibatch_gradient()

    @_disable_dynamo
    def _after_step(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        if self._stepping is not optimizer:
            return
        self._stepping = None
        self.step += 1
        state, self._state = self._state, None
        if state is None or self._closed:
            return
        begin = time.perf_counter()
        row: dict[str, Any] = {"step": state.step, "learning_rate": state.learning_rate}

        def measure() -> None:
            state.update = state.proposed = self.objective.theta() - state.theta
            for probe in (*(registry.probes[name] for name in MEASURED), *self._probes):
                row.update(probe.measure(state))
            row["caveat"] = (
                "; ".join(filter(None, [state.source.report.caveat, *state.notes])) or None
            )
            if state.source.report.ill_defined and (above := alignments_above(state)):
                row.update(above)
                row["caveat"] = f"{row['caveat']}; alignments are by the share above lambda_k"
            threshold = threshold_at(state, optimizer)
            row["stability_threshold"] = threshold.value
            row["preconditioned_sharpness"] = threshold.preconditioned or None

        reason = self._failure_of(measure, row, "not complete")
        if reason is None:
            self._failures = 0
        sharpness = row.get("sharpness")
        preconditioned = row.pop("preconditioned_sharpness", None)
        # Where a report has failed, that has come to some processes before they knew, and not to
        # others; of itself the report is one without it still.
        if reason is None and preconditioned:
            row |= self._preconditioned_sharpness(state)
            sharpness = row.get("preconditioned_sharpness")
        row["stability_margin"] = _margin(sharpness, row.get("stability_threshold"))
        if reason is None:
            self._account(state, row)
        row["seconds"] = self._seconds + time.perf_counter() - begin
        self._report(row | {"failure": reason} if reason else row)

    def _failure_of(
        self, measure: Callable[[], None], row: Mapping[str, Any], left: str
    ) -> str | None:
        """Do a part of a report; where it fails, say why, and count it."""
        reason = self._attempt(measure)
        if reason is None:
            return None
        self._failures += 1
        self._begin_anew()
        self.spacing.postpone(self.step)
        if self._leads:
            warn(f"step {row['step']}: {reason}; this report is {left}")
        if self.ended and self._leads:
            warn(
                f"{MOST_FAILURES} reports in a row failed: no more are made; the training continues"
            )
        return reason

    def _attempt(self, measure: Callable[[], None]) -> str | None:
        """Run it so that neither an error nor a random number of it reaches the training."""
        begin = cost_of(self.objective)
        try:
            with all_or_none(self.objective):
                _refuse_capture()
                with undisturbed(self.objective.device), warnings_that_stop_nothing():
                    measure()
            return None
        except Exception as error:
            reason, memory = reason_of(error), False
            with contextlib.suppress(Exception):  # a message that cannot be made
                memory = is_out_of_memory(error)
        except BaseException:
            # An interrupt ends the step, and may have come in the middle of an update.
            self._begin_anew()
            raise
        finally:
            self._spent += (cost_of(self.objective) or 0) - (begin or 0)
        if memory:
            # Outside of the handler: the traceback kept the graph alive.
            with contextlib.suppress(Exception):
                gc.collect()
                torch.cuda.empty_cache()
        return reason

    def _account(self, state: StepState, row: dict[str, Any]) -> None:
        """Note what the report and the training before it have cost, over all processes."""

        def account() -> None:
            samples, counted = self.objective.num_samples, cost_of(self.objective)
            reduction = reduction_in(self.objective)
            trained = reduction.total(float(self._trained.take()))
            spent = reduction.total(float(self._spent)) / PARTS
            if counted is None:
                spent = (1 + state.source.report.subspace_cost) * samples
            self.spacing.note(state.step, spent, trained)
            row["report_gradients"] = spent / samples
            if trained:
                row["overhead"] = self.spacing.overhead

        if self._attempt(account):
            self.spacing.postpone(state.step)
        else:
            self._say_when_the_next_comes(row)
        self._spent = 0

    def _say_when_the_next_comes(self, row: Mapping[str, Any]) -> None:
        """Once, after the first report: what it cost, and what that means."""
        if self.quiet or self.history or self.spacing.every is not None:
            return
        cost = f"this report cost {row['report_gradients']:.3g} gradients over the watched data"
        then = f"the next is at step {self.spacing.next_step}"
        if row.get("overhead") is None:
            say = f"{cost}; the training's samples are not seen, and {then}: give every="
        else:
            say = f"{cost}; at {self.spacing.budget:.0%} of the training {then}"
            say += ": change budget= or every=, or watch fewer samples="
        say_if_possible(f"thalweg.watch: {say}")

    def _preconditioned_sharpness(self, state: StepState) -> dict[str, Any]:
        found: list[Subspace] = []

        def measure() -> None:
            found.append(
                preconditioned_sharpness(
                    self.objective, self.optimizer, state.theta, start=self._direction
                )
            )

        if reason := self._attempt(measure):
            self._direction = None
            failure = f"no preconditioned sharpness: {reason}"
            if self._leads:
                warn(failure)
            return {"failure": failure}
        self._direction = found[0].basis[:, 0]
        return {"preconditioned_sharpness": float(found[0].eigenvalues[0])}

    def _report(self, measured: Mapping[str, Any]) -> None:
        row: dict[str, Any] = {column: measured.get(column) for column in self._columns}
        # Not those of `history`, which belong to the user.
        self._recent.append(row.copy())
        for part in ("dominant", "bulk"):
            numerators, denominators = (
                [report[f"lr_{side}_{part}"] for report in self._recent]
                for side in ("numerator", "denominator")
            )
            rate = effective_learning_rate(numerators, denominators)
            row[f"effective_lr_{part}"] = rate if math.isfinite(rate) else None
        # Sinks may draw random numbers too, as for the name of a run.
        with undisturbed(self._device()), warnings_that_stop_nothing(), _among_hooks():
            self._sinks.log(row, measured["step"])

    def _begin_anew(self) -> None:
        """Forget the subspace, where the source can: it may have been left half updated."""
        self._state = self._direction = None
        if self._fresh is None:
            return
        with contextlib.suppress(Exception):
            # What memory allowed was no fault of the subspace.
            known = self.objective.state_dict()
            self.source.load_state_dict(copy.deepcopy(self._fresh))
            self.objective.load_state_dict(known)

    def _begin_anew_elsewhere(self) -> None:
        """A subspace of another device or dtype, before the model was moved, is of no use."""
        kind = self.objective.device, self.objective.dtype
        if kind != self._kind:
            self._kind = kind
            self._begin_anew()

    def _refuse_other_parameters(self, optimizer: Optimizer) -> None:
        """Raise where the model has parameters now in the place of those that were optimized."""
        present = list(self.objective.parameters())
        held = held_by(optimizer)
        if len(present) != len(self._parameters):
            raise invalid("parameters of theta", len(present), f"{len(self._parameters)} as before")
        for number, (now, before) in enumerate(zip(present, self._parameters, strict=True)):
            if now is not before and id(before) in self._held and id(now) not in held:
                raise InvalidInput(
                    f"parameter {number} of theta, {tuple(now.shape)}, is another object than the"
                    " optimizer updates: it was replaced; build optimizer and watcher anew"
                )
        self._parameters, self._held = present, held

    def _learning_rate(self, optimizer: Optimizer) -> float:
        """The largest of the groups that hold watched parameters; NaN without any."""
        watched = {id(parameter) for parameter in self._parameters}
        own = [g for g in optimizer.param_groups if any(id(p) in watched for p in g["params"])]
        rates = [group.get("lr") for group in own or optimizer.param_groups]
        return max((float(rate) for rate in rates if rate is not None), default=math.nan)

    def _device(self) -> torch.device:
        """Where the parameters live, or did when they were last found."""
        with contextlib.suppress(Exception):
            return self.objective.device
        return self._kind[0]

    def _minibatch_gradient(self) -> Tensor | None:
        """The gradient that the optimizer is about to use, (P,); None where there is none."""
        gradients = [parameter.grad for parameter in self._parameters]
        if all(gradient is None for gradient in gradients):
            return None
        dense = [
            torch.zeros_like(p) if g is None else _dense(g.detach()).to(p.dtype)
            for p, g in zip(self._parameters, gradients, strict=True)
        ]
        return flat(dense, sharding_of_parameters(self._parameters))


def _dense(gradient: Tensor) -> Tensor:
    return gradient if gradient.layout == torch.strided else gradient.to_dense()


def _margin(sharpness: float | None, threshold: float | None) -> float | None:
    """1 - sharpness / threshold, both in one metric; None where not known."""
    if threshold is None or sharpness is None or not 0 < threshold < math.inf:
        return None
    return 1 - sharpness / threshold


def _models_of(loss: Loss) -> list[Module]:
    """The models whose training is seen: that of an `Objective`, those of a sum."""
    model = getattr(loss, "model", None)
    inside = [_models_of(term.loss) for term in getattr(loss, "terms", ())]
    return [*([model] if isinstance(model, Module) else []), *itertools.chain(*inside)]


def _is_whole(loss: Loss) -> bool:
    """Whether its samples are batches."""
    samples = getattr(loss, "samples", None)
    return samples is not None and are_whole(samples)


def _fresh_state(source: SubspaceSource) -> dict[str, Any] | None:
    """The state of a source that has no subspace yet; None where it has, or cannot say."""
    try:
        state = source.state_dict()
        tensors = [leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor)]
        return None if any(leaf.is_floating_point() for leaf in tensors) else copy.deepcopy(state)
    except Exception:
        return None


_hooks_at_work: list[None] = []


@contextmanager
def _among_hooks() -> Iterator[None]:
    """Note that an optimizer is going through its hooks, none of which may be removed meanwhile."""
    _hooks_at_work.append(None)
    try:
        yield
    finally:
        _hooks_at_work.pop()


def _capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _refuse_capture() -> None:
    if _capturing():
        raise InvalidInput(
            "the step is being captured in a CUDA graph, which a report would break; capture"
            " before you watch, or with `every` such that no report falls on it"
        )


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
    devices = [device] if device.type == "cuda" and not _capturing() else []
    try:
        with torch.random.fork_rng(devices), torch.autocast(device.type, enabled=False):
            yield
    finally:
        random.setstate(python_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)


def _shown(value: Any) -> str:
    """A value of a report as text."""
    if isinstance(value, list | tuple):
        return ", ".join(_shown(entry) for entry in value)
    return f"{value:.5g}" if isinstance(value, float) else str(value)
