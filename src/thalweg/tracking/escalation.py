"""From which measure an update of a tracker begins: follow, renew, or solve.

To follow by a subset is cheapest, a renewal (a product of the block with all samples) is dearer and
more exact, a solve from scratch is the dearest and always right. An update begins with one of them
and goes on to the next where the estimated error misses the target. Where the cheaper one has
failed again and again it is only an addition to the cost, and updates begin with the next at once,
for some time. Decided by counts and estimates alone, so that two runs with one seed decide alike.

Example:
    >>> escalation = Escalation()
    >>> for _ in range(2):
    ...     escalation.note(RENEW, at_once=True)
    >>> escalation.begins == RENEW, escalation.left
    (True, 10)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

FOLLOW, RENEW, SOLVE = 0, 1, 2
FAILURES = 2
"""In a row, after which updates begin with what helped."""
PATIENCE = 10
"""For so many updates at first; twice as many where the next try fails again."""
MOST_PATIENCE = 80


@dataclass
class Escalation:
    """With which measure the next update begins, and for how many.

    Attributes:
        begins: `FOLLOW`, `RENEW` or `SOLVE`.
        left: updates that begin so; counts only beyond `FOLLOW`.
        failures: of the measure that updates begin with, in a row.
        patience: updates that will begin with the next measure.
    """

    begins: int = FOLLOW
    left: int = 0
    failures: int = 0
    patience: int = PATIENCE

    def note(self, reached: int, *, at_once: bool = True) -> None:
        """Note how an update went.

        Args:
            reached: the measure that it ended with.
            at_once: whether its first measure failed without having served before: a reference
                that served for some steps was worth its cost.
        """
        if reached > self.begins and at_once:
            self.failures += 1
            if self.failures >= FAILURES:
                self.begins, self.left, self.failures = reached, self.patience, 0
                self.patience = min(2 * self.patience, MOST_PATIENCE)
            return
        self.failures = 0
        if self.begins == FOLLOW:
            if reached == FOLLOW:
                self.patience = PATIENCE
            return
        self.left -= 1
        if self.left <= 0:
            # One failure is enough to come back.
            self.begins, self.left, self.failures = FOLLOW, 0, FAILURES - 1

    def state_dict(self) -> dict[str, Any]:
        """All of it, as numbers."""
        return asdict(self)
