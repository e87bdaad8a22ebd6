"""How many local steps does a worker of local SGD make before the workers are averaged?

A constant number H, or the quadratic synchronization rule: H_s = max(H_base, floor((alpha / lr)^2))
for round s, with the learning rate lr of the round's first step. A round is what lies between two
averages; the last one ends with the training.

Source: Gu, Lyu, Arora, Zhang, Huang 2024 (arXiv 2310.14423). As in their public code, H is chosen
right after an average, with the learning rate of the step that follows, and cut to the steps that
remain; throughout a warm-up it is H_base, for the small learning rates there would make the first
round the whole training.

Example:
    >>> rule = QuadraticRule(alpha=0.0175, minimum=4)
    >>> [rule.period(lr, step=0) for lr in (0.008, 0.004, 0.001)]
    [4, 19, 306]
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from thalweg.errors import invalid


class AveragingPeriod(Protocol):
    """Protocol of a rule for the length of a round."""

    @property
    def grows(self) -> bool:
        """Whether a round can be so long that only the end of the training bounds it."""
        ...

    def period(self, learning_rate: float, step: int) -> float:
        """Local steps of the round that begins at `step`, >= 1; infinite: until the end."""
        ...


@dataclass(frozen=True)
class ConstantPeriod:
    """H local steps in every round; 1 is synchronous training.

    Raises:
        InvalidInput: steps below 1.
    """

    steps: int

    def __post_init__(self) -> None:
        _require_count("steps", self.steps)

    @property
    def grows(self) -> bool:
        """False."""
        return False

    def period(self, learning_rate: float, step: int) -> int:
        """H."""
        return self.steps


@dataclass(frozen=True)
class QuadraticRule:
    """The quadratic synchronization rule.

    Args:
        alpha: > 0; rounds are longer than the minimum where lr < alpha / minimum^(1 / power).
        minimum: H_base, >= 1.
        power: > 0; 2 is the rule of the paper, which compares it with 1 and 3.
        warmup_steps: rounds that begin before this step are of H_base steps.

    Raises:
        InvalidInput: a setting out of range.
    """

    alpha: float
    minimum: int = 1
    power: float = 2.0
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        _require_count("minimum", self.minimum)
        for name in ("alpha", "power"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise invalid(name, value, "a number > 0")
        if self.warmup_steps < 0:
            raise invalid("warmup_steps", self.warmup_steps, "a number of steps >= 0")

    @property
    def grows(self) -> bool:
        """True."""
        return True

    def period(self, learning_rate: float, step: int) -> float:
        """max(H_base, floor((alpha / lr)^power)); infinite at learning rate 0.

        What is below a whole number by no more than rounding, of float32 learning rates too, is
        that number: (0.3 / 0.1)^2 is 9.
        """
        if step < self.warmup_steps:
            return self.minimum
        try:
            grown = (self.alpha / learning_rate) ** self.power
        except (OverflowError, ZeroDivisionError):
            return math.inf
        return grown if math.isinf(grown) else max(self.minimum, _floor(grown))


class Rounds:
    """Counter of the steps and rounds of local SGD.

    Args:
        schedule: gives the length of each round.
        total_steps: of the training, which the last round ends with; None: not known.

    Attributes:
        steps: made so far, in all rounds.
        period: H of the current round, or of the last one between two rounds; 0 before the first.
        done: steps made in the current round; 0 between two rounds.

    Raises:
        InvalidInput: total_steps below 0; not given where rounds can grow without bound.
    """

    def __init__(self, schedule: AveragingPeriod, total_steps: int | None = None) -> None:
        if total_steps is None and schedule.grows:
            end = "a growing round needs an end"
            raise invalid("total_steps", None, "the number of steps of the training", end)
        if total_steps is not None and total_steps < 0:
            raise invalid("total_steps", total_steps, "a number of steps >= 0")
        self.schedule = schedule
        self.total_steps = total_steps
        self.steps = 0
        self.period = 0
        self.done = 0

    def begin_step(self, learning_rate: float) -> None:
        """Choose the length of the round where this is its first step."""
        if self.done:
            return
        chosen = self.schedule.period(learning_rate, self.steps)
        if self.total_steps is not None:
            # At least 1: a training that continues beyond its end is synchronous.
            chosen = max(1, min(chosen, self.total_steps - self.steps))
        self.period = int(chosen)

    def end_step(self) -> bool:
        """Count a step; returns whether it was its round's last, so that the average is due."""
        self.steps += 1
        self.done += 1
        if self.done < self.period:
            return False
        self.done = 0
        return True

    def state_dict(self) -> dict[str, int]:
        """The counters."""
        return {"steps": self.steps, "period": self.period, "done": self.done}

    def load_state_dict(self, state: Mapping[str, int] | None) -> None:
        """Restore what `state_dict` gave; None begins anew."""
        state = state or {"steps": 0, "period": 0, "done": 0}
        self.steps, self.period, self.done = state["steps"], state["period"], state["done"]


def _floor(value: float) -> int:
    """The floor, or the next whole number where that is nearer than 1e-6 of it, and than 1e-3."""
    return math.floor(value + min(1e-6 * value, 1e-3))


def _require_count(name: str, value: int) -> None:
    if value < 1:
        raise invalid(name, value, "a whole number >= 1")
