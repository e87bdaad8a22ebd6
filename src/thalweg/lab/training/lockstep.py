"""Runs that share one computation: a step of all of them at once.

Each is an ordinary `Run`, with its own folder, lock, table, status and checkpoints; probes ask the
same `StepState`, filled from what was computed for all. What is computed for all, of theta (R, P):

    gradients of the mini-batches -> rules at S_k -> the subspaces that splits follow -> the step

- **Places.** R stays as it was. In the place of a run that has left stands a copy of the first that
  goes on, put there anew at each step. What `vmap` computes in one place does not depend on what is
  in the others, so the others' bits stay; with another R sums are made in other orders.
- **Leaving.** A run leaves between two steps (its end, divergence, a failure), once all others have
  saved a checkpoint: so who is there is known from the step, however the process ended.
- **Two trackers.** One follows the runs that need S_k at every step, one those that ask at rows
  alone. Renewals are common to the runs of a tracker: a run that diverges changes when the others
  of its tracker are renewed, within the target error, and no bit of those in the other one.
- **A checkpoint** of a run holds its own part of the trackers, what is common, and who goes on.

Source: none; see `LockstepTracker` for what is batched.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thalweg.errors import Diverged, IntegrityError, InvalidInput, ThalwegError, invalid
from thalweg.lab.store.checkpoint import list_checkpoints, load_checkpoint, verify_checkpoint
from thalweg.lab.store.metrics import MetricsWriter
from thalweg.lab.training.building import make_objective, make_source, stream_seed
from thalweg.lab.training.loop import Run, Unwritten
from thalweg.lab.training.run_state import LOCKSTEP, restored_state
from thalweg.lab.training.step import samples_of, state_at
from thalweg.loss.guards.determinism import mode_dependent_layers
from thalweg.loss.lockstep_objective import LockstepObjective
from thalweg.measure.step_state import StepState
from thalweg.optim.lockstep_sgd import split_factors, split_step
from thalweg.optim.split import SplitUpdate
from thalweg.spectrum.subspace import Subspace
from thalweg.tracking.lockstep_tracker import LockstepTracker
from thalweg.tracking.source import Split, TrackerReport

EVERY_STEP, AT_ROWS = "every step", "at rows"
"""When a run asks for S_k."""
EVERY_CHUNK = 10**9
TRIED_SAMPLES, TRIED_VECTORS = 2, 4
SAME_LOSS = 1e-3
"""Relative difference of a loss in training mode from the one whose curvature is known."""
KEEP = 2
"""Checkpoints that each run keeps at least: all have one in common, whenever the process ends."""


@dataclass
class Member:
    """One of the runs, in its place.

    Attributes:
        run, place: see `LockstepRuns`.
        asks: when it asks for S_k.
        metrics: its table, while it is trained.
        stack: what is closed when it leaves: table, status, lock.
        now: the state of the present step, where something asks for it.
        told: whether its row of this step has told what the subspace cost.
        error: why it leaves, or has left; None for its end.
    """

    run: Run
    place: int = 0
    asks: str = EVERY_STEP
    metrics: MetricsWriter | Unwritten | None = None
    stack: ExitStack = field(default_factory=ExitStack)
    now: StepState | None = None
    told: bool = False
    error: Exception | None = None

    @property
    def has_rule(self) -> bool:
        """Whether a rule on loss or alignment may end the present phase."""
        phase = self.run.progression.phase
        return phase.until_alignment is not None or phase.until_loss is not None

    @property
    def is_first(self) -> bool:
        """Whether the run begins with this step."""
        return self.run.step == self.run.progression.position.start


class Followed:
    """The subspaces of the runs in some places, moved on once a step at the most.

    Attributes:
        places: the runs' places, in their order.
        tracker: None as long as nobody has asked.
        moved: whether it was moved on at the present step.
    """

    def __init__(self, places: Sequence[int]) -> None:
        self.places = list(places)
        self.tracker: LockstepTracker | None = None
        self.moved = False
        self._pairs: tuple[Tensor, Tensor] | None = None

    def row(self, place: int) -> int:
        """The row of a place."""
        return self.places.index(place)

    def forget(self) -> None:
        """A new step begins."""
        self.moved, self._pairs = False, None

    def subspace(self, place: int) -> Subspace:
        """S_k of the run in a place; all are decomposed at once."""
        assert self.tracker is not None
        if self._pairs is None:
            self._pairs = self.tracker.eigenpairs()
        values, rows = (each[self.row(place)] for each in self._pairs)
        return Subspace(rows.T, values)

    def report(self, place: int) -> TrackerReport:
        """What following has cost the run in a place, and how exact it is."""
        assert self.tracker is not None
        return self.tracker.reports[self.row(place)]

    def state_of(self, place: int) -> dict[str, Any] | None:
        """The part of one run, and what is common."""
        return None if self.tracker is None else self.tracker.state_dict_of(self.row(place))


class SharedSource:
    """A `SubspaceSource`: the subspace of one run among those that are followed together."""

    def __init__(self, lockstep: LockstepRuns, member: Member) -> None:
        self._lockstep, self._member = lockstep, member

    @property
    def report(self) -> TrackerReport:
        """What the last update cost, and how far it can be trusted."""
        return self._followed.report(self._member.place)

    @property
    def subspace(self) -> Subspace:
        """The subspace of the last update."""
        return self._followed.subspace(self._member.place)

    def update(self, theta: Tensor | None = None, vector: Tensor | None = None) -> Subspace:
        """The subspace at the present step, for all runs that are followed with this one."""
        self._lockstep.move_on(self._followed)
        if self._member.error is not None:
            raise self._member.error
        return self.subspace

    def split(self, vector: Tensor) -> Split:
        """Split a vector (P,) at the theta of the last update."""
        error = self.report.error
        return Split(*self.subspace.split(vector), error=error, bulk_error=error)

    def state_dict(self) -> dict[str, Any]:
        """What the lockstep says of this run."""
        return {LOCKSTEP: self._lockstep.record_of(self._member)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Not one by one: a lockstep takes up all its runs together."""
        raise NotImplementedError

    @property
    def _followed(self) -> Followed:
        return self._lockstep.followed[self._member.asks]


class LockstepRuns:
    """Runs that are trained in one computation; `execute` takes each to its end.

    Args:
        runs: of one problem, which `reason_alone` lets share a computation.

    Raises:
        InvalidInput: they cannot, by their data or models: nothing has been begun then.

    Attributes:
        members: the runs, by place; of a lockstep that goes on those that are still there.
        followed: whose subspaces are followed together, by when they ask.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self.members = [Member(run, place) for place, run in enumerate(runs)]
        for member in self.members:
            member.run.keep = max(KEEP, member.run.keep)
            member.asks = _asks(member.run)
        _check_alike(runs)
        first = runs[0]
        self.objective = _lockstep_objective(first, len(runs))
        self.names = [_name(run) for run in runs]
        self.tick = 0
        self.group = ""
        self._asks = [member.asks for member in self.members]
        self.followed = self._unfollowed()
        self._going: list[Member] = []
        self._thetas = torch.empty(0)
        self._vectors = torch.empty(0)
        self._columns: tuple[object, tuple[Tensor, Tensor]] | None = None

    def execute(self) -> list[Exception | None]:
        """Train all runs, each from its last checkpoint or its start, to their ends.

        Returns:
            For each run how it ended: None, or the error that `Run.execute` would have raised.
        """
        with ExitStack() as stacks:
            for member in self.members:
                stacks.push(member.stack)
            every = list(self.members)
            self._begin()
            try:
                while self._top():
                    self._step()
                    self.tick += 1
            except Exception as error:
                for member in self._present:
                    member.error = member.error or error
                    self._leave(member)
            return [member.error for member in every]

    @property
    def _present(self) -> list[Member]:
        return [member for member in self.members if member.metrics is not None]

    # Where they begin.

    def _begin(self) -> None:
        for member in self.members:
            self._guarded(member, member.stack.enter_context, member.run.folder.locked())
        free = [member for member in self.members if member.error is None]
        records, starts = _common(free)
        for member in free:
            self._guarded(member, self._sit_down, member, starts.get(member.place))
        here = self._present
        if not here:
            return
        if records:
            self._go_on(here, records)
        else:
            self._start(here)
        run = here[0].run
        count = len(self.names)
        self._thetas = run.setup.objective.theta().repeat(count, 1)
        for member in here:
            self._thetas[member.place] = member.run.setup.objective.theta()
            member.run.state.source = SharedSource(self, member)
            member.run.note_lockstep(f"lockstep-{self.group}")

    def _sit_down(self, member: Member, start: Path | None) -> None:
        with ExitStack() as stack:
            metrics = stack.enter_context(member.run.sitting(start))
            member.stack.push(stack.pop_all())
            member.metrics = metrics

    def _start(self, here: Sequence[Member]) -> None:
        """A new lockstep of those that are here."""
        for place, member in enumerate(here):
            member.place = place
            if member.run.step != member.run.progression.position.start:
                member.run.folder.log(
                    "goes on in lockstep with other runs than before, its tracker begun anew:"
                    " numbers may differ in the last digits from those of an undisturbed run"
                )
        self.names = [_name(member.run) for member in here]
        self._asks = [member.asks for member in here]
        self.followed = self._unfollowed()
        text = json.dumps([[_name(m.run), m.run.hash, m.run.step] for m in here])
        self.group = hashlib.sha256(text.encode()).hexdigest()[:8]

    def _go_on(self, here: Sequence[Member], records: Mapping[str, Mapping[str, Any]]) -> None:
        """The lockstep that the runs were in, with those of it that are here."""
        known = next(iter(records.values()))
        self.names, self.tick, self.group = known["names"], known["tick"], known["group"]
        self._asks = known["asks"]
        self.followed = self._unfollowed()
        for member in here:
            member.place = self.names.index(_name(member.run))
        by_place = {member.place: records[_name(member.run)] for member in here}
        if missing := [self.names[p] for p in known["on"] if p not in by_place]:
            for member in here:
                member.run.folder.log(
                    f"goes on in lockstep without {', '.join(missing)}: numbers may differ in the"
                    " last digits from those of an undisturbed run"
                )
        on = [place for place in known["on"] if place in by_place]
        for asks, followed in self.followed.items():
            first = next((p for p in followed.places if p in on), None)
            if first is None or by_place[first]["followed"] is None:
                continue
            followed.tracker = self._tracker(here[0].run)
            followed.tracker.load_state_dicts(
                [by_place[p if p in on else first]["followed"] for p in self.followed[asks].places]
            )

    def _unfollowed(self) -> dict[str, Followed]:
        return {
            asks: Followed([p for p, when in enumerate(self._asks) if when == asks])
            for asks in (EVERY_STEP, AT_ROWS)
        }

    def _tracker(self, run: Run) -> LockstepTracker:
        settings = run.spec.subspace
        return LockstepTracker(
            self.objective,
            run.setup.k,
            error=settings.error,
            tolerance=settings.tolerance,
            seed=stream_seed("subspaces in lockstep", settings.seed),
        )

    def record_of(self, member: Member) -> dict[str, Any]:
        """What a checkpoint of a run says of the lockstep: see the module."""
        return {
            "group": self.group,
            "names": self.names,
            "asks": self._asks,
            "tick": self.tick,
            "on": [each.place for each in self._going],
            "followed": self.followed[member.asks].state_of(member.place),
        }

    # Between two steps.

    def _top(self) -> bool:
        """Save what is due, let those leave that do; whether another step follows."""
        present = self._present
        leaving = [m for m in present if m.error is not None or not self._remains(m)]
        self._going = [m for m in present if m not in leaving]
        runs = [member.run for member in self._going]
        stops = any(run.should_stop() for run in runs)
        saves = any(run.saves_by_time or run.saves_by_step for run in runs)
        if leaving or stops or saves:
            for member in self._going:
                self._guarded(member, self._save, member)
        for member in leaving:
            self._leave(member)
        if stops:
            for member in self._going:
                self._guarded(member, member.run.interrupt)
                self._leave(member)
        self._going = [member for member in self._going if member.metrics is not None]
        return bool(self._going)

    def _remains(self, member: Member) -> bool:
        run = member.run
        remains = run.progression.step_remains()
        if remains:
            run.progression.ends_by_hand = run.progression.is_requested()
        return remains

    def _save(self, member: Member) -> None:
        assert member.metrics is not None
        self._put_back(member)
        member.run.checkpoint(member.metrics, regular=member.run.saves_by_step)

    def _leave(self, member: Member) -> None:
        """End a run's sitting, at its end or by its error."""
        metrics, error = member.metrics, member.error
        assert metrics is not None
        member.metrics = None
        try:
            with member.stack:
                if error is not None:
                    raise error
                self._put_back(member)
                member.run.checkpoint(metrics, ends=True)
                # What it measures there is no affair of the others.
                state = member.run.state
                state.source = make_source(state.spec, state.setup, state.seed)
                member.run.last_row(metrics)
        except Exception as raised:
            member.error = raised

    def _put_back(self, member: Member) -> None:
        """Into the run's model and optimizer what has happened to them."""
        run = member.run
        run.setup.objective.layout.write(run.setup.problem.model, self._thetas[member.place])
        for group in run.optimizer.param_groups:
            group["lr"] = run.progression.learning_rate

    def _guarded(self, member: Member, call: Callable[..., Any], *arguments: Any) -> None:
        """Do something for one run; what goes wrong is its own affair."""
        try:
            call(*arguments)
        except Exception as error:
            member.error = error

    # A step.

    def _step(self) -> None:
        for followed in self.followed.values():
            followed.forget()
        for member in self._going:
            member.now, member.told = None, False
        self._fill(self._thetas)
        losses, gradients = self.objective.values_and_gradients(self._thetas, self._samples())
        self._vectors = gradients.clone()
        self._note_divergence(losses, gradients)
        if not self._stepping:
            return
        self._ask_rules()
        if any(m.asks == EVERY_STEP for m in self._stepping):
            self.move_on(self.followed[EVERY_STEP])
        moves = [member for member in self._stepping if not self._ends(member)]
        for member in moves:
            self._guarded(member, self._look, member)
        self._move([member for member in moves if member.error is None], losses, gradients)

    @property
    def _stepping(self) -> list[Member]:
        return [member for member in self._going if member.error is None]

    def _fill(self, stacked: Tensor, among: Sequence[int] | None = None) -> None:
        """Put into the places of those that have left what the first of the others has (R, ...)."""
        places = [member.place for member in self._stepping]
        within = range(len(self.names)) if among is None else among
        here = [place for place in within if place in places]
        gone = [place for place in within if place not in places]
        if here and gone:
            stacked[gone] = stacked[here[0]].clone()

    def _samples(self) -> Tensor | None:
        """The mini-batches, int64 (R, b); None where each is all samples."""
        first = self._stepping[0].run
        total = first.setup.problem.num_samples
        size = first.progression.phase.batch_size
        if size in ("all", total):
            return None
        chosen = torch.zeros(len(self.names), size, dtype=torch.int64)
        for member in self._stepping:
            run = member.run
            batch = samples_of(run.progression.phase, run.seed, run.step, 0, total)
            chosen[member.place] = batch
        self._fill(chosen)
        return chosen.to(self._thetas.device)

    def _note_divergence(self, losses: Tensor, gradients: Tensor) -> None:
        """See who goes on with numbers; waits for the device once."""
        sound = torch.stack(
            [
                self._thetas.isfinite().all(1).to(losses),
                gradients.isfinite().all(1).to(losses),
                losses,
            ]
        )
        for member in self._stepping:
            theta, gradient, loss = sound[:, member.place].tolist()
            if not theta:
                member.error = Diverged("a parameter is NaN or infinite")
            elif not abs(loss) < float("inf"):
                member.error = Diverged(f"the mini-batch loss is {loss}")
            elif not gradient:
                member.error = Diverged("the mini-batch gradient is NaN or infinite")
        for stacked in (self._thetas, self._vectors):
            self._fill(stacked)

    def _ask_rules(self) -> None:
        """Prepare what rules on loss and alignment look at."""
        asked = [member for member in self._stepping if member.has_rule]
        if not asked:
            return
        losses, gradients = self.objective.values_and_gradients(self._thetas)
        finite = (losses.isfinite() & gradients.isfinite().all(1)).tolist()
        known = losses.tolist()
        for member in asked:
            if not finite[member.place]:
                member.error = Diverged("the loss or its gradient is NaN or infinite")
                continue
            now = self._state(member)
            now.__dict__["loss_and_gradient"] = known[member.place], gradients[member.place]
            self._vectors[member.place] = gradients[member.place]
        self._fill(self._vectors)

    def _ends(self, member: Member) -> bool:
        """Whether a rule ends the phase before this step; the run then waits for the next one."""
        progression = member.run.progression
        if not (member.has_rule or progression.ends_by_hand):
            return False
        try:
            now = self._state(member)
            now.subspace_updated = self.followed[member.asks].moved
            return progression.ends(now)
        except Exception as error:
            member.error = error
            return True

    def _look(self, member: Member) -> None:
        """Prepare a row, where one is due."""
        due = member.run.recorder.due(member.run.step, everything=member.is_first)
        if not due:
            member.now = None
            return
        now = self._state(member)
        if any(probe.needs_gradient for probe in due):
            self._vectors[member.place] = now.gradient

    def _state(self, member: Member) -> StepState:
        if member.now is None:
            self._put_back(member)
            member.now = state_at(member.run.state)
        return member.now

    def move_on(self, followed: Followed) -> None:
        """Follow the subspaces to the present thetas; once a step."""
        while not followed.moved:
            here = [member for member in self._stepping if member.place in followed.places]
            if not here:
                return
            for stacked in (self._thetas, self._vectors):
                self._fill(stacked, followed.places)
            tracker, first = followed.tracker, followed.row(here[0].place)
            if tracker is None:
                tracker = followed.tracker = self._tracker(here[0].run)
                before = None
            else:
                rows = {followed.row(member.place) for member in here}
                for gone in set(range(len(followed.places))) - rows:
                    tracker.stand_in(gone, first)
                before = tracker.state_dict()
            thetas = self._thetas[followed.places]
            vectors = self._vectors[followed.places]
            try:
                tracker.update(thetas, vectors)
                followed.moved = True
            except (Diverged, torch.linalg.LinAlgError) as error:
                if not self._blame(here, followed, thetas, vectors):
                    raise
                del error
                followed.tracker = None if before is None else self._tracker(here[0].run)
                if followed.tracker is not None:
                    followed.tracker.load_state_dict(before or {})

    def _blame(
        self, here: Sequence[Member], followed: Followed, thetas: Tensor, vectors: Tensor
    ) -> bool:
        """Note which runs' products are no numbers; whether there is one."""
        products = self.objective.hessian_products(thetas, vectors.unsqueeze(1))
        sound = products.flatten(1).isfinite().all(1).tolist()
        for member in here:
            if not sound[followed.row(member.place)]:
                member.error = Diverged("a product with the Hessian is NaN or infinite")
        return any(member.error is not None for member in here)

    def _move(self, members: Sequence[Member], losses: Tensor, gradients: Tensor) -> None:
        """From theta_t to theta_{t+1}, and the rows that are due."""
        if not members:
            return
        on_gradient, on_dominant = self._factors(members)
        dominant = self._dominant(members, gradients)
        moved = split_step(self._thetas, gradients, dominant, on_gradient, on_dominant)
        known = losses.tolist() if any(member.now is not None for member in members) else []
        rows = [member for member in members if member.now is not None]
        for member in rows:
            place = member.place
            parts = gradients[place], dominant[place], moved[place]
            self._guarded(member, self._row, member, known[place], *parts)
        for member in members:
            if member.error is not None:
                continue
            self._thetas[member.place] = moved[member.place]
            run, followed = member.run, self.followed[member.asks]
            if member.now is None:
                run.recorder.pass_by()
            if followed.moved and not member.told:
                run.recorder.spend(followed.report(member.place).subspace_cost)
            run.progression.position.step += 1
            self._guarded(member, run.status.running)

    def _factors(self, members: Sequence[Member]) -> tuple[Tensor, Tensor]:
        """The factors of `split_step`, (R, 1) each; of those that do not move any."""
        numbers = [[0.0, 1.0, 1.0] for _ in self.names]
        for member in members:
            progression = member.run.progression
            numbers[member.place] = [progression.learning_rate, *progression.split_factors]
        if self._columns is None or self._columns[0] != numbers:
            columns = self._thetas.new_tensor(numbers).unsqueeze(-1).unbind(1)
            self._columns = numbers, split_factors(*columns)
        return self._columns[1]

    def _dominant(self, members: Sequence[Member], gradients: Tensor) -> Tensor:
        """P_k g of the runs whose update is split, (R, P); zero elsewhere."""
        dominant = torch.zeros_like(gradients)
        followed = self.followed[EVERY_STEP]
        if followed.moved:
            assert followed.tracker is not None
            places = followed.places
            dominant[places] = followed.tracker.project(gradients[places])
        for member in members:
            point = member.run.state.branch_point
            if _split_is_frozen(member.run):
                assert point is not None
                dominant[member.place] = point.subspace.project(gradients[member.place])
        return dominant

    def _row(
        self, member: Member, loss: float, gradient: Tensor, dominant: Tensor, moved: Tensor
    ) -> None:
        """Measure what is due at theta_t, as `make_step` does."""
        run, now = member.run, member.now
        assert now is not None
        assert member.metrics is not None
        followed = self.followed[member.asks]
        run.setup.objective.layout.write(run.setup.problem.model, moved)
        now.minibatch_loss, now.minibatch_gradient = loss, gradient
        now.proposed, now.update = -now.learning_rate * gradient, moved - now.theta
        now.subspace_updated = followed.moved
        optimizer = run.optimizer
        if isinstance(optimizer, SplitUpdate):
            optimizer.dominant, optimizer.bulk = run.progression.split_factors
            if not _split_is_frozen(run):
                part = -now.learning_rate * dominant
                error = followed.report(member.place).error
                split = Split(part, now.proposed - part, error=error, bulk_error=error)
                now.keep_parts(split, optimizer.dominant, optimizer.bulk)
        row = run.recorder.row(now, everything=member.is_first)
        member.told = followed.moved
        if row is not None:
            member.metrics.log(row, row["step"])


def _name(run: Run) -> str:
    return f"{run.study.path.name}/seed-{run.seed}/{run.branch}"


def _split_is_frozen(run: Run) -> bool:
    split = run.progression.phase.split
    return split is not None and split.changes and split.basis == "frozen"


def _asks(run: Run) -> str:
    """When a run asks for S_k, over all its phases."""
    for phase in run.progression.phases:
        split = phase.split
        follows = split is not None and split.changes and split.basis == "live"
        if follows or phase.until_alignment is not None:
            return EVERY_STEP
    return AT_ROWS


def _check_alike(runs: Sequence[Run]) -> None:
    """Refuse runs that do not have the same data, model and k.

    Raises:
        InvalidInput: see above; a model that trains otherwise than its curvature is known.
    """
    first = runs[0].setup
    for run in runs:
        setup = run.setup
        if layers := mode_dependent_layers(setup.problem.model):
            raise invalid("lockstep", f"layer {layers[0][0]}, which {layers[0][2]}", "none such")
        if setup.k != first.k:
            raise invalid("lockstep", f"k = {setup.k} and {first.k}", "one k")
        buffers = zip(setup.problem.model.buffers(), first.problem.model.buffers(), strict=True)
        tensors = zip(setup.problem.train, first.problem.train, strict=True)
        if not all(torch.equal(*pair) for pair in (*buffers, *tensors)):
            raise invalid("lockstep", "data or buffers that differ between the seeds", "the same")


def _lockstep_objective(run: Run, count: int) -> LockstepObjective:
    """The losses of so many runs, the fastest way that the model has: found by trying.

    Raises:
        InvalidInput: the model cannot be shared, see `LockstepObjective`.
    """
    objective = make_objective(run.spec, run.setup.problem)
    on_gpu = objective.device.type == "cuda"
    failed: InvalidInput | None = None
    for replay, largest in ((True, EVERY_CHUNK), (False, EVERY_CHUNK), (False, 0)):
        if replay and not on_gpu:
            continue
        runs = LockstepObjective(objective, vectorize_up_to=largest, replay=replay)
        try:
            _try(runs, run, count)
            return runs
        except InvalidInput as error:
            failed = error
    assert failed is not None
    raise failed


def _try(runs: LockstepObjective, run: Run, count: int) -> None:
    problem, objective = run.setup.problem, runs.objective
    samples = torch.arange(min(TRIED_SAMPLES, problem.num_samples), device=objective.device)
    thetas = objective.theta().repeat(count, 1)
    losses, gradients = runs.values_and_gradients(thetas, samples.repeat(count, 1))
    runs.hessian_products(thetas, gradients.unsqueeze(1).repeat(1, TRIED_VECTORS, 1), samples)
    before = [buffer.clone() for buffer in problem.model.buffers()]
    inputs, targets = (part[samples] for part in problem.train)
    with torch.no_grad():
        trained = float(problem.loss(problem.model(inputs), targets))
    after = list(problem.model.buffers())
    known = float(losses[0])
    same = abs(trained - known) <= SAME_LOSS * abs(known) or trained != trained
    if not same or not all(map(torch.equal, before, after)):
        raise invalid("lockstep", "a model that trains otherwise than it is evaluated", "one loss")


def _common(
    members: Iterable[Member],
) -> tuple[dict[str, Mapping[str, Any]], dict[int, Path]]:
    """The newest checkpoints of one lockstep and step that all have; empty where there are none.

    Returns:
        What they say of the lockstep, by name of the run, and where they are, by place.
    """
    found: list[dict[tuple[str, int], tuple[Path, Mapping[str, Any]]]] = []
    here = list(members)
    for member in here:
        known: dict[tuple[str, int], tuple[Path, Mapping[str, Any]]] = {}
        for path in list_checkpoints(member.run.folder.checkpoints):
            record = _record(path, member.run)
            if record is not None and _name(member.run) in record["names"]:
                known[record["group"], record["tick"]] = path, record
        found.append(known)
    shared = set.intersection(*map(set, found)) if found else set()
    if not shared:
        return {}, {}
    newest = max(shared, key=lambda moment: (moment[1], moment[0]))
    records = {_name(m.run): known[newest][1] for m, known in zip(here, found, strict=True)}
    starts = {m.place: known[newest][0] for m, known in zip(here, found, strict=True)}
    return records, starts


def _record(path: Path, run: Run) -> Mapping[str, Any] | None:
    """What a checkpoint says of the lockstep that saved it; None where none did, or it is bad."""
    try:
        verify_checkpoint(path, run.hash)
        state = restored_state(load_checkpoint(path), run.setup.objective.device)
    except (IntegrityError, ThalwegError):
        return None
    return state["source"].get(LOCKSTEP)
