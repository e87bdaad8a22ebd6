"""What belongs to one run of a lockstep, and to those of them that are followed together?

Probes and splits ask a run's `SubspaceSource`, here as everywhere: `SharedSource` is that of a run
whose subspace is followed with the others'.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from thalweg.lab.store.metrics import MetricsWriter
from thalweg.lab.training.loop import Run, Unwritten
from thalweg.lab.training.run_state import LOCKSTEP
from thalweg.measure.step_state import StepState
from thalweg.spectrum.subspace import Subspace
from thalweg.tracking.lockstep_tracker import LockstepTracker
from thalweg.tracking.source import Split, TrackerReport

EVERY_STEP, AT_ROWS = "every step", "at rows"
"""When a run asks for S_k."""


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
    """A `SubspaceSource`: the subspace of one run among those that are followed together.

    Args:
        member: the run.
        followed: those that are followed with it.
        move_on: follows them to the present step, unless that was done.
        record_of: what a checkpoint of a run says of the lockstep.
    """

    def __init__(
        self,
        member: Member,
        followed: Followed,
        move_on: Callable[[Followed], None],
        record_of: Callable[[Member], dict[str, Any]],
    ) -> None:
        self._member, self._followed = member, followed
        self._move_on, self._record_of = move_on, record_of

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
        self._move_on(self._followed)
        if self._member.error is not None:
            raise self._member.error
        return self.subspace

    def split(self, vector: Tensor) -> Split:
        """Split a vector (P,) at the theta of the last update."""
        error = self.report.error
        return Split(*self.subspace.split(vector), error=error, bulk_error=error)

    def state_dict(self) -> dict[str, Any]:
        """What the lockstep says of this run."""
        return {LOCKSTEP: self._record_of(self._member)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Not one by one: a lockstep takes up all its runs together."""
        raise NotImplementedError


def asks_when(run: Run) -> str:
    """When a run asks for S_k, over all its phases."""
    for phase in run.progression.phases:
        split = phase.split
        follows = split is not None and split.changes and split.basis == "live"
        if follows or phase.until_alignment is not None:
            return EVERY_STEP
    return AT_ROWS
