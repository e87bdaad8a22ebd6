"""Runs that share one computation: a step of all of them at once.

Each is an ordinary `Run`, with its own folder, lock, table, status and checkpoints; probes ask the
same `StepState`, filled from what was computed for all. What is computed for all, of theta (R, P):

    gradients of the mini-batches -> rules at S_k -> the subspaces that splits follow -> the step

- **Places.** R stays as it was. In the place of a run that has left stands a copy of the first that
  goes on, put there anew at each step. What `vmap` computes in one place does not depend on what is
  in the others, so the others' bits stay; with another R sums are made in other orders.
- **Leaving.** A run leaves between two steps (its end, divergence, a failure), once all others have
  saved a checkpoint, as all do at the beginning: so who is there is known from the step, however
  the process ended.
- **Two trackers.** One follows the runs that need S_k at every step, one those that ask at rows
  alone. Renewals are common to the runs of a tracker: a run that diverges changes when the others
  of its tracker are renewed, within the target error, and no bit of those in the other one.
- **A checkpoint** of a run holds its own part of the trackers, what is common, and who goes on.

What is batched in a tracker is said in `LockstepTracker`; which runs can share a computation, in
docs/lockstep.md.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thalweg.errors import Diverged, Interrupted, InvalidInput, ThalwegError
from thalweg.lab.training.building import make_source, stream_seed
from thalweg.lab.training.lockstep_beginning import (
    check_alike,
    common_checkpoints,
    lockstep_objective,
    name_of,
)
from thalweg.lab.training.lockstep_members import (
    AT_ROWS,
    EVERY_STEP,
    Followed,
    Member,
    SharedSource,
    asks_when,
)
from thalweg.lab.training.loop import Run
from thalweg.lab.training.step import samples_of, state_at
from thalweg.measure.step_state import StepState
from thalweg.optim.lockstep_sgd import split_factors, split_step
from thalweg.optim.split import SplitUpdate
from thalweg.tracking.lockstep_tracker import LockstepTracker
from thalweg.tracking.source import Split

KEEP = 2
"""Checkpoints that each run keeps at least: all have one in common, whenever the process ends."""


class LockstepRuns:
    """Runs that are trained in one computation; `execute` takes each to its end.

    Args:
        runs: of one problem, which `reason_alone` lets share a computation.

    Raises:
        InvalidInput: they cannot, by their data or models: nothing has been begun then.

    Attributes:
        members: the runs, in the order given.
        followed: whose subspaces are followed together, by when they ask.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self.members = [Member(run, place) for place, run in enumerate(runs)]
        for member in self.members:
            member.run.keep = max(KEEP, member.run.keep)
            member.asks = asks_when(member.run)
        check_alike(runs)
        first = runs[0]
        self.objective = lockstep_objective(first, len(runs))
        self.names = [name_of(run) for run in runs]
        self.tick = 0
        self.group = ""
        self._asks = [member.asks for member in self.members]
        self.followed = self._unfollowed()
        self._going: list[Member] = []
        self._ended: list[Member] = []
        # Who was there at the tick from which it goes on.
        self._found: dict[int, dict[str, Any]] = {}
        self._thetas = torch.empty(0)
        self._vectors = torch.empty(0)
        self._columns: tuple[object, tuple[Tensor, Tensor]] | None = None

    def execute(self) -> list[Exception | None]:
        """Train all runs, each from its last checkpoint or its start, to their ends.

        Returns:
            For each run how it ended: None, or the error that `Run.execute` would have raised.

        Raises:
            InvalidInput: what all compute together failed, as for want of memory; each run can go
                on by itself, and shows whether the mistake was its own.
        """
        with ExitStack() as stacks:
            for member in self.members:
                stacks.push(member.stack)
            self._begin()
            try:
                while self._top():
                    self._step()
                    self.tick += 1
            except Exception as error:
                what = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
                for member in self._present:
                    member.run.folder.log(f"leaves its lockstep at step {member.run.step}: {what}")
                raise InvalidInput(what) from error
            return [member.error for member in self.members]

    @property
    def _present(self) -> list[Member]:
        # By place, in whatever order they were given: the first one stands in for those gone.
        here = [member for member in self.members if member.metrics is not None]
        return sorted(here, key=lambda member: member.place)

    # Where they begin.

    def _begin(self) -> None:
        for member in self.members:
            self._guarded(member, member.stack.enter_context, member.run.folder.locked())
        free = [member for member in self.members if member.error is None]
        # In one order, however they were given: the generators are left as the last one wants them.
        free.sort(key=lambda member: name_of(member.run))
        records, starts = common_checkpoints(free)
        for member in free:
            self._guarded(member, self._sit_down, member, starts.get(member.place))
        here = [member for member in free if member.metrics is not None]
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
            member.run.state.source = SharedSource(
                member, self.followed[member.asks], self.move_on, self.record_of
            )
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
        self.names = [name_of(member.run) for member in here]
        self._asks = [member.asks for member in here]
        self.followed = self._unfollowed()
        text = json.dumps([[name_of(m.run), m.run.hash, m.run.step] for m in here])
        self.group = hashlib.sha256(text.encode()).hexdigest()[:8]

    def _go_on(self, here: Sequence[Member], records: Mapping[str, Mapping[str, Any]]) -> None:
        """The lockstep that the runs were in, with those of it that are here."""
        known = next(iter(records.values()))
        self.names, self.tick, self.group = known["names"], known["tick"], known["group"]
        self._asks = known["asks"]
        self.followed = self._unfollowed()
        for member in here:
            member.place = self.names.index(name_of(member.run))
        by_place = {member.place: records[name_of(member.run)] for member in here}
        on = sorted({place for record in records.values() for place in record["on"]})
        left = {place for record in records.values() for place in record["ended"]}
        self._found = {self.tick: {"on": on, "ended": sorted(left)}}
        gone = [place for place in on if place not in by_place and place not in left]
        if missing := [self.names[place] for place in gone]:
            for member in here:
                member.run.folder.log(
                    f"goes on in lockstep without {', '.join(missing)}: numbers may differ in the"
                    " last digits from those of an undisturbed run"
                )
        on = [place for place in on if place in by_place]
        for followed in self.followed.values():
            first = next((p for p in followed.places if p in on), None)
            if first is None or by_place[first]["followed"] is None:
                continue
            followed.tracker = self._tracker(here[0].run)
            followed.tracker.load_state_dicts(
                [by_place[p if p in on else first]["followed"] for p in followed.places]
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
        """What a checkpoint of a run says of the lockstep: see the module.

        That of a run at its end knows those that end with it: all may be extended.
        """
        ends = member in self._ended
        on = self._going + (self._ended if ends else [])
        # One that was saved at its end, and killed before it was done, is saved there again.
        found = self._found.get(self.tick, {}) if ends else {}
        return {
            "group": self.group,
            "names": self.names,
            "asks": self._asks,
            "tick": self.tick,
            "on": sorted(each.place for each in on),
            "ended": [each.place for each in self._ended],
            "followed": self.followed[member.asks].state_of(member.place),
            **found,
        }

    # Between two steps.

    def _top(self) -> bool:
        """Save what is due, let those leave that do; whether another step follows."""
        present = self._present
        leaving = [m for m in present if m.error is not None or not self._remains(m)]
        self._going = [m for m in present if m not in leaving]
        self._ended = [m for m in leaving if m.error is None]
        runs = [member.run for member in self._going]
        stops = any(run.should_stop() for run in runs)
        # At the beginning, too: killed while the first of them save, all have that in common.
        due = any(run.saves_by_time or run.saves_by_step for run in runs)
        saves = due or self.tick == 0
        if leaving or stops or saves:
            # Those at their end, too: none is done before all know of this step.
            for member in self._going + self._ended:
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
                    if not isinstance(error, (Diverged, Interrupted)):
                        is_known = isinstance(error, ThalwegError)
                        what = str(error) if is_known else f"{type(error).__name__}: {error}"
                        # Now: the others may go on for long.
                        member.run.status.write("failed", what)
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
            except (Diverged, RuntimeError):
                followed.tracker = None if before is None else self._tracker(here[0].run)
                if followed.tracker is not None:
                    followed.tracker.load_state_dict(before or {})
                if not self._blame(here, followed, thetas, vectors):
                    raise

    def _blame(
        self, here: Sequence[Member], followed: Followed, thetas: Tensor, vectors: Tensor
    ) -> bool:
        """Note which runs' products are no numbers; whether there is one."""
        rows = vectors.unsqueeze(1)
        if followed.tracker is not None:
            rows = torch.cat([rows, followed.tracker.eigenpairs()[1]], dim=1)
        products = self.objective.hessian_products(thetas, rows)
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


def _split_is_frozen(run: Run) -> bool:
    split = run.progression.phase.split
    return split is not None and split.changes and split.basis == "frozen"
