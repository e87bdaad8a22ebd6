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
from thalweg.linalg import norm
from thalweg.loss.cost import PARTS, cost_of
from thalweg.loss.guards.memory import is_out_of_memory
from thalweg.loss.layout import flat
from thalweg.loss.protocol import Loss
from thalweg.loss.reduce import reduction_in
from thalweg.loss.samples import are_whole
from thalweg.loss.shards import sharding_of_parameters
from thalweg.measure.agreement import all_or_none
from thalweg.measure.curvature_shares import alignments_above
from thalweg.measure.preconditioned_sharpness import preconditioned_sharpness
from thalweg.measure.probes import Probe
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
from thalweg.measure.tier import MOST_FAILURES, QUICK_GRADIENTS, Tier, tiers
from thalweg.measure.training_samples import TrainingSamples
from thalweg.optim.stability import stability_threshold
from thalweg.representation import as_html
from thalweg.sharding import packed, sharding_of, unpacked
from thalweg.spectrum.subspace import Subspace
from thalweg.tracking.source import SubspaceSource
from thalweg.tracking.wrapping import held_by, stepping, unwrapped

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
"""The keys of a full report: columns of the file, and keys of each row of `Watcher.history`.

Where there are quick rows those of `tier.QUICK` follow; a quick row has them, `loss`,
`learning_rate` and `stability_threshold`, and None elsewhere. Of the probes, see `probes`.

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
probes included, in the same unit; `overhead` what all rows have cost, as a part of the training
so far, None where its samples are not seen; `seconds` is what the whole report took; `caveat` is
None, or a text: why a value is NaN, or why the subspace is not to be trusted: its target was
missed, or it is ill defined at this k. Then alignments are square roots of the shares above
lambda_k, which need no gap (see `curvature_profile`), and the text says so; `failure` is None, or
a text that says why the columns that are None could not be measured.
"""

UNMOVED = "the step left the parameters where they were: its direction is unknown"
"""The caveat of a step at learning rate 0, without gradients, or that a fused optimizer skipped."""


class Watcher:
    """Reports on steps of an optimizer, until it is closed.

    It acts through the optimizer's own hooks. The subspace, the loss and its gradient are those of
    theta before the step. A step without a report costs the check of a counter. Steps that are
    never made, such as those that a gradient scaler skips, are not counted. A context manager,
    closed at its end.

    What is reported is what happens to the parameters: where one of Thalweg's optimizers wraps the
    given one, now or later, the step is that of the wrapper if that is called, from its beginning
    to its end. Theta is fixed when it is built: where parameters are frozen, unfrozen or added to
    the optimizer later, one warning and the `caveat` of each row say so. Wrappers of other
    libraries are looked through inwards (Accelerate's, Lightning's); of those around the given
    optimizer, hand over the outermost.

    Nothing that goes wrong in a report reaches the training (`KeyboardInterrupt` does): it is a
    `WatchWarning`, and a row whose `failure` says why. The next report is tried, its subspace
    solved from scratch, and after three failures in a row reports end; quick rows and full reports
    by themselves. Warnings of a report that
    the user turned into errors go to standard error.

    Processes that share the samples skip a report together, see `agreement.py`; the first of them
    alone writes: the others have `history`, and no console, file or sinks.

    Args:
        objective: the loss, over the data that is watched.
        source: gives the dominant subspace; usually a `SubspaceTracker` of the objective.
        optimizer: whose steps are watched, or a wrapper.
        every: report at steps 0, every, 2 every, ..., whatever it costs; None for as often as
            `budget` allows.
        quick_every: between the reports, quick rows at steps 0, quick_every, ..., whatever they
            cost: what a few forward passes and a gradient tell, without the subspace, see
            `tier.py`. None for as often as a third of `budget` allows, where that spaces the
            reports too, and none with `every`; 0 for none.
        budget: the most that reports may cost, as a part of what the training costs, see
            `ReportSpacing`: the first one, at step 0, is paid for before the next is made. Where
            the samples of a training step are not seen (a compiled model, a loss without a model)
            reports are `report_spacing.EVERY` steps apart.
        file: CSV file for the rows; None for `history` alone.
        sinks: where else the rows go, see `Sinks`; closed with the watcher.
        quiet: write nothing to the console (standard error).
        overwrite: replace the file, if it is there.
        resume_at: for a resumed training, the number of its next optimizer step: steps count from
            there, and a file that is there is continued.
        probes: what else a report asks, such as "curvature_shares"; their columns follow
            `COLUMNS`. Names, or `Probe`s of your own. Those that are quick are in quick rows too.

    Attributes:
        history: one dict a row; `pandas.DataFrame(watcher.history)`.
        step: the number of the next step.

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
        quick_every: int | None = None,
        budget: float = 0.05,
        file: str | os.PathLike[str] | None = None,
        sinks: Iterable[Sink | str | Callable[[Any, int], Any]] = (),
        quiet: bool = False,
        overwrite: bool = False,
        resume_at: int | None = None,
        probes: Sequence[str | Probe] = (),
    ) -> None:
        if resume_at is not None and resume_at < 0:
            raise invalid("resume_at", resume_at, "an integer >= 0")
        self.objective = objective
        self.source = source
        self.optimizer = optimizer
        reduction = reduction_in(objective)
        self._leads = reduction.rank == 0
        start = resume_at or 0
        if isinstance(probes, str) or not isinstance(probes, Sequence):
            raise invalid("probes", probes, "a list of probes", 'such as ["trace"]')
        further = [
            each if isinstance(each, Probe) else registry.probes.find(each) for each in probes
        ]
        self.budget = budget
        self._tiers = tiers(
            every=every, quick_every=quick_every, budget=budget, begin=start, further=further
        )
        self._trained = TrainingSamples(_models_of(objective), whole=_is_whole(objective))
        self.quiet = quiet = quiet or not self._leads
        self.step = start
        history = History()
        self.history: list[dict[str, Any]] = history.rows
        quick = [probe for tier in self._tiers[1:] for probe in tier.probes]
        columns = [column for probe in (*quick, *further) for column in probe.columns]
        self._columns = tuple(dict.fromkeys((*COLUMNS, *columns)))
        self._parameters = list(objective.parameters())
        self._held = held_by(optimizer)
        trained, theta = self._trained_now(), {id(parameter) for parameter in self._parameters}
        self._names, self._has_strangers = set(trained), False
        self._is_a_part = any(id(each) not in theta for each in trained.values())
        self._kind = objective.device, objective.dtype
        self._fresh = _fresh_state(source)
        self._closed = False
        self._state: StepState | None = None
        # Those that the present step is reported by.
        self._due: list[Tier] = []
        self._seconds = 0.0
        self._spent_on_gradient = 0
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
    def spacing(self) -> ReportSpacing:
        """When full reports are made."""
        return self._tiers[0].spacing

    @property
    def every(self) -> int | None:
        """Steps from one full report to the next; None where a budget spaces them."""
        return self.spacing.every

    @property
    def ended(self) -> bool:
        """Whether no more rows come, since `MOST_FAILURES` of each kind failed in a row."""
        return all(tier.ended for tier in self._tiers)

    @property
    def closed(self) -> bool:
        """Whether it watches no more, since it was closed."""
        return self._closed

    def note_samples(self, count: int) -> None:
        """Say that the training evaluates so many samples now, in this process.

        For a training whose passes through the model are not heard: a compiled model, one of which
        parts alone are called. Where they are heard, it changes nothing.
        """
        self._trained.tell(count)

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
            "of": self._identity(),
            "tiers": {tier.name: tier.state_dict() for tier in self._tiers},
            "trained": self._trained.heard,
            "told": self._trained.told,
            "source": self.source.state_dict(),
            "direction": packed(self._direction),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave, into a watcher of the same loss and optimizer.

        Raises:
            InvalidInput: it is no such state, or of another k, or of a loss with another number of
                parameters or of samples.
        """
        needed = ("step", "trained", "source", "direction")
        if not isinstance(state, Mapping) or any(name not in state for name in needed):
            raise invalid("state", type(state).__name__, "what watcher.state_dict() gave")
        # Version 0.1 did not say of what it is.
        for name, own in self._identity().items():
            if (saved := state.get("of", {}).get(name, own)) != own:
                raise invalid(f"{name} of the saved state", saved, f"{own}, as watched now")
        self.step = state["step"]
        # Before there were quick rows, what is full was beside the others.
        saved = state.get("tiers", {"full": state})
        for tier in self._tiers:
            if tier.name in saved:
                tier.load_state_dict(saved[tier.name])
            else:
                tier.spacing.begin = tier.spacing.next_step = self.step
        self._trained.heard = state["trained"]
        self._trained.told = state.get("told", 0)
        self.source.load_state_dict(state["source"])
        self._direction = unpacked(state["direction"], sharding_of(self.objective))

    def _identity(self) -> dict[str, int]:
        """What a state can be told from that of another watch by."""
        found = {
            "num_parameters": self.objective.num_parameters,
            "num_samples": self.objective.num_samples,
        }
        k = getattr(self.source, "k", None)
        return found | ({"k": k} if isinstance(k, int) else {})

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
        self._due = [] if self._closed else self._tiers_due()
        if not self._due:
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
            begin = self._counted()
            _ = state.gradient
            self._spent_on_gradient = self._counted() - begin
            if self._due[0].needs_subspace:
                _ = state.subspace
            state.notes += self._strangers()
            states.append(state)

        if reason := self._failure_of(self._due[0], measure, row, "empty"):
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
        reasons: list[str] = []
        done: list[Tier] = []
        last = 0
        for tier in self._due:
            measure = functools.partial(self._measure, tier, state, optimizer, row)
            before = self._counted()
            if reason := self._failure_of(tier, measure, row, "not complete"):
                reasons.append(reason)
            else:
                tier.failures = 0
                done.append(tier)
                last = self._spent_on_gradient + self._counted() - before
        row["caveat"] = "; ".join(filter(None, [row.get("caveat"), *state.notes])) or None
        if self._tiers[0] not in done:
            # Where a report has failed, this has come to some processes before they knew, and not
            # to others.
            row.pop("preconditioned_sharpness", None)
        self._compare_with_threshold(state, row)
        if done:
            self._account(state, row, done, last)
        row["seconds"] = self._seconds + time.perf_counter() - begin
        failures = [*reasons, *filter(None, [row.get("failure")])]
        self._report(row | {"failure": "; ".join(failures) or None})

    def _tiers_due(self) -> list[Tier]:
        """Those that report this step: a full report has what a quick row has, too."""
        due = [tier.is_due(self.step) for tier in self._tiers]
        first = due.index(True) if True in due else len(due)
        return [tier for tier in self._tiers[first:] if not tier.ended]

    def _measure(
        self, tier: Tier, state: StepState, optimizer: Optimizer, row: dict[str, Any]
    ) -> None:
        """Fill in what a tier says of the step."""
        if state.update is None:
            state.update = state.proposed = self.objective.theta() - state.theta
            if not float(norm(state.update)) > 0:
                state.notes.append(UNMOVED)
        row.update(tier.measure(state))
        threshold = threshold_at(state, optimizer)
        row["stability_threshold"] = threshold.value
        if not tier.needs_subspace:
            return
        row["preconditioned_sharpness"] = threshold.preconditioned or None
        row["caveat"] = state.source.report.caveat
        if state.source.report.ill_defined and (above := alignments_above(state)):
            row.update(above)
            row["caveat"] += "; alignments are by the share above lambda_k"

    def _compare_with_threshold(self, state: StepState, row: dict[str, Any]) -> None:
        """The stability margin, and the sharpness in the optimizer's metric, where it is that."""
        sharpness = row.get("sharpness")
        if row.pop("preconditioned_sharpness", None):
            # Without it the report is one still.
            row |= self._preconditioned_sharpness(state)
            sharpness = row.get("preconditioned_sharpness")
        row["stability_margin"] = _margin(sharpness, row.get("stability_threshold"))

    def _failure_of(
        self, tier: Tier, measure: Callable[[], None], row: Mapping[str, Any], left: str
    ) -> str | None:
        """Do a part of a row; where it fails, say why, and count it for its tier."""
        reason = self._attempt(measure)
        if reason is None:
            return None
        tier.failures += 1
        if tier.needs_subspace:
            self._begin_anew()
        for each in self._due:
            each.spacing.postpone(self.step)
        if self._leads:
            warn(f"step {row['step']}: {reason}; this {tier.kind} is {left}")
        if tier.ended and self._leads:
            warn(
                f"{MOST_FAILURES} {tier.kind}s in a row failed: no more are made; the training"
                " continues"
            )
        return reason

    def _attempt(self, measure: Callable[[], None]) -> str | None:
        """Run it so that neither an error nor a random number of it reaches the training."""
        begin = self._counted()
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
            self._due[0].unpaid += self._counted() - begin
        if memory:
            # Outside of the handler: the traceback kept the graph alive.
            with contextlib.suppress(Exception):
                gc.collect()
                torch.cuda.empty_cache()
        return reason

    def _account(
        self, state: StepState, row: dict[str, Any], done: Sequence[Tier], last: int
    ) -> None:
        """Note what the row and the training before it have cost, over all processes.

        Args:
            state, row: of the step.
            done: those of the tiers due that did not fail.
            last: what the last one cost, or would have cost by itself, in `PARTS` of a gradient.
        """

        def account() -> None:
            samples, counted = self.objective.num_samples, cost_of(self.objective)
            reduction = reduction_in(self.objective)
            trained = reduction.total(float(self._trained.take()))
            spent = reduction.total(float(self._due[0].unpaid)) / PARTS
            alone = reduction.total(float(last)) / PARTS if self._tiers[1:] else 0.0
            if counted is None:
                alone = QUICK_GRADIENTS * samples
                spent = (1 + state.source.report.subspace_cost) * samples
                spent = spent if self._due[0].needs_subspace else alone
            for tier in self._tiers:
                if tier is self._due[0]:
                    tier.spacing.note(state.step, spent, trained)
                elif tier in done:
                    tier.spacing.forgo(state.step, alone, trained)
                else:
                    tier.spacing.training += trained
            row["report_gradients"] = spent / samples
            if training := self.spacing.training:
                row["overhead"] = sum(tier.spacing.cost for tier in self._tiers) / training

        failed = self._attempt(account)
        for tier in self._due:
            if failed or tier not in done:
                tier.spacing.postpone(state.step)
        if not failed:
            self._say_when_the_next_comes(row)
        self._due[0].unpaid = 0

    def _counted(self) -> int:
        """What the loss has cost so far, in `PARTS`; 0 where it does not count."""
        return cost_of(self.objective) or 0

    def _say_when_the_next_comes(self, row: Mapping[str, Any]) -> None:
        """Once, after the first report: what it cost, and what that means."""
        if self.quiet or self.history or self.spacing.every is not None:
            return
        cost = f"this report cost {row['report_gradients']:.3g} gradients over the watched data"
        then = f"the next is at step {self.spacing.next_step}"
        for tier in self._tiers[1:]:
            then += f", the first {tier.kind} at {tier.spacing.next_step}"
        if row.get("overhead") is None:
            unseen = "the training's samples are not seen"
            say = f"{cost}; {unseen}, and {then}: give every=, or call note_samples"
        else:
            say = f"{cost}; at {self.budget:.0%} of the training {then}"
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
        # By rows of their own, not those of `history`, which belong to the user.
        for tier in self._due:
            row |= tier.effective_rates(row)
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

    def _named(self) -> list[tuple[str, Tensor]]:
        """The parameters of the watched models."""
        models = _models_of(self.objective)
        return list(itertools.chain(*(model.named_parameters() for model in models)))

    def _trained_now(self) -> dict[str, Tensor]:
        """Those of them that are trained at present."""
        held = held_by(self.optimizer)
        return {
            name: each for name, each in self._named() if each.requires_grad and id(each) in held
        }

    def _strangers(self) -> list[str]:
        """A text where other parameters are trained than when the watch began; warned of once."""
        theta = {id(parameter) for parameter in self._parameters}
        # By that alone: FSDP shows other objects while its parameters are whole.
        frozen = {n for n, each in self._named() if id(each) in theta and not each.requires_grad}
        # Who watches a part of the model by its names leaves parameters out from the start.
        joined = set() if self._is_a_part else self._trained_now().keys() - self._names
        said = [
            f"{_listed(them)} {what} in these numbers: watch anew"
            for them, what in (
                (joined, "are trained by now, and are not"),
                (self._names & frozen, "are no longer trained, and are still"),
            )
            if them
        ]
        if said and not self._has_strangers and self._leads:
            warn(f"step {self.step}: {'; '.join(said)}")
        self._has_strangers = bool(said)
        return said

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
        # Fused optimizers divide by the factor of a gradient scaler themselves, in their step.
        scale = getattr(unwrapped(self.optimizer).base, "grad_scale", None)
        gradients = [parameter.grad for parameter in self._parameters]
        if all(gradient is None for gradient in gradients):
            return None
        dense = [
            torch.zeros_like(p) if g is None else _dense(g.detach()).to(p.dtype)
            for p, g in zip(self._parameters, gradients, strict=True)
        ]
        gradient = flat(dense, sharding_of_parameters(self._parameters))
        return gradient if scale is None else gradient / float(scale)


def _dense(gradient: Tensor) -> Tensor:
    return gradient if gradient.layout == torch.strided else gradient.to_dense()


def _margin(sharpness: float | None, threshold: float | None) -> float | None:
    """1 - sharpness / threshold, both in one metric; None where not known."""
    if threshold is None or sharpness is None or not 0 < threshold < math.inf:
        return None
    return 1 - sharpness / threshold


def _listed(names: set[str]) -> str:
    """Some names as text, the first few of many."""
    few = sorted(names)[:3]
    return ", ".join(few) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


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
