"""Which phase is a run in, which step is next, and when does a phase end?

A phase ends at its bound in steps, or before it: by the paper's rule on the averaged alignment, at
a loss, or by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thalweg.lab.config import PhaseSpec
    from thalweg.measure.step_state import StepState


@dataclass
class Position:
    """Where a run stands.

    Attributes:
        step: updates made since the trunk's start.
        start: the step that the run began at: 0, or the branch point.
        phase: number of the phase; `phase_start`: the step it began at.
        alignment_average: the rule's moving average, 0 at the phase's start, so that no rule fires
            on its first steps alone: 0.95 takes at least 29 of them at factor 0.9.
        finished: whether the last phase has ended.
        obeyed: the last request to end a phase by hand that was followed.
        message: what the user should know about how a phase ended.
    """

    step: int = 0
    start: int = 0
    phase: int = 0
    phase_start: int = 0
    alignment_average: float = 0.0
    finished: bool = False
    obeyed: str = ""
    message: str = ""


class Progression:
    """Moves a run through its phases.

    Args:
        phases: of the run, in order.
        num_samples: N, for phases counted in epochs.
        request: a file that asks to end the current phase by hand, see `phase_request`.
        say: takes one line on why a phase ended.

    Attributes:
        ends_by_hand: whether the current phase is to end before the next step, see `is_requested`.
    """

    def __init__(
        self,
        phases: tuple[PhaseSpec, ...],
        num_samples: int,
        request: Path,
        say: Callable[[str], None],
    ) -> None:
        self.phases = phases
        self.num_samples = num_samples
        self.position = Position()
        self.ends_by_hand = False
        self._request = request
        self._say = say

    def begin_at(self, step: int) -> None:
        """Begin the first phase at this step: that of a branch point."""
        self.position = Position(step=step, start=step, phase_start=step)

    @property
    def phase(self) -> PhaseSpec:
        """The phase that the run is in."""
        return self.phases[self.position.phase]

    @property
    def bound(self) -> int:
        """The most steps of the current phase."""
        return self.phase.most_steps(self.num_samples)

    @property
    def end_step(self) -> int | None:
        """The step at which the run ends at the latest; None before its last phase."""
        is_last = self.position.phase == len(self.phases) - 1
        return self.position.phase_start + self.bound if is_last else None

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        done = self.position.step - self.position.phase_start
        return self.phase.learning_rate(max(0, min(done, self.bound - 1)), max(1, self.bound))

    @property
    def split_factors(self) -> tuple[float, float]:
        """Factors on the dominant and the bulk part of the next step's update."""
        done = self.position.step - self.position.phase_start
        return self.phase.split_factors(max(0, min(done, self.bound - 1)), self.bound)

    def step_remains(self) -> bool:
        """Whether a step remains; moves on to the next phase where a bound is reached."""
        while not self.position.finished:
            if self._below_bound():
                return True
            self._note_deadline()
            self._next_phase()
        if self._has_rule() or not self._below_bound():
            return False
        # A finished run whose bound was raised continues.
        self.position.finished = False
        return True

    def ends(self, now: StepState) -> bool:
        """Whether a rule ends the phase now, before this step; if so, moves on to the next."""
        reason = self._reason(now)
        if reason:
            self._say(f"phase {self.phase.name!r} ends at step {self.position.step}: {reason}")
            self._next_phase()
        return bool(reason)

    def state_dict(self) -> dict[str, Any]:
        """The position, as plain values."""
        return asdict(self.position)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.position = Position(**state)

    def forget_request(self) -> None:
        """Remove a request that was followed; only once a checkpoint knows that it was."""
        if self.position.obeyed and self._requested() == self.position.obeyed:
            self._request.unlink(missing_ok=True)

    def _below_bound(self) -> bool:
        return self.position.step - self.position.phase_start < self.bound

    def _has_rule(self) -> bool:
        return self.phase.until_alignment is not None or self.phase.until_loss is not None

    def _reason(self, now: StepState) -> str:
        phase, position = self.phase, self.position
        if phase.until_alignment is not None:
            # The gradient first, so that the subspace is as exact as its projection needs.
            gradient = now.gradient
            chi = now.subspace.alignment(gradient)
            factor = phase.alignment_ema
            position.alignment_average = factor * position.alignment_average + (1 - factor) * chi
            if position.alignment_average >= phase.until_alignment:
                reached = f"{position.alignment_average:.4f} reached {phase.until_alignment}"
                return f"averaged alignment {reached}"
        if phase.until_loss is not None and now.loss <= phase.until_loss:
            return f"loss {now.loss:.4g} is at or below {phase.until_loss}"
        if self.ends_by_hand:
            position.obeyed, self.ends_by_hand = self._requested(), False
            return "by hand"
        return ""

    def is_requested(self) -> bool:
        """Whether somebody asks to end the phase by hand, and it was not followed yet."""
        request = self._requested()
        return bool(request) and request != self.position.obeyed

    def _requested(self) -> str:
        """The request's own name; empty where there is none (the usual case: one look a step)."""
        if not self._request.exists():
            return ""
        return self._request.read_text(encoding="utf-8").strip()

    def _next_phase(self) -> None:
        position = self.position
        if position.phase + 1 == len(self.phases):
            position.finished = True
            return
        position.phase += 1
        position.phase_start = position.step
        position.alignment_average = 0.0

    def _note_deadline(self) -> None:
        if not self._has_rule():
            return
        by_alignment = self.phase.until_alignment is not None
        average = self.position.alignment_average
        reached = f" (averaged alignment {average:.3f})" if by_alignment else ""
        self.position.message = (
            f"phase {self.phase.name!r}: its rule never fired{reached}; ended at the deadline, step"
            f" {self.position.step}"
        )
        self._say("warning: " + self.position.message)
