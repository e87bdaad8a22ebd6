"""When is the next report due? At every n-th step, or as often as a budget allows.

Cost of reports and training are counted in gradients of one sample, over all processes: never in
seconds, so that one seed reports at the same steps on every machine, and every process at the same.

Example:
    >>> spacing = ReportSpacing(None, budget=0.05)
    >>> spacing.is_due(0)
    True
    >>> spacing.note(0, cost=1000.0, training=10.0)  # each step trains on 10 samples
    >>> spacing.next_step  # with the report there, 2,000 gradients are 5 % of the training
    4000
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from thalweg.errors import invalid

EVERY = 50
"""Steps between reports, where the samples of a training step are not seen."""
ROUND = 10
"""Reports that a budget spaces are at multiples of so many steps."""


@dataclass
class ReportSpacing:
    """Decides at which steps reports are made.

    Args:
        every: at steps 0, every, 2 every, ...; None for as often as the budget allows.
        budget: the most that reports may cost, as a part of what the training costs, > 0. The
            first report is made before there is a training; the others wait until it is paid for.

    Attributes:
        begin: the first step whose training is counted.
        next_step: the step of the next report, by the budget.
        cost: of all reports, in gradients of one sample.
        forgone: what those would have cost that were not made, since another one had all of them.
        dearest: of one of them.
        training: what the training cost, likewise.

    Raises:
        InvalidInput: `every` < 1, a budget that is not positive.

    Example: see the module.
    """

    every: int | None
    budget: float = 0.05
    begin: int = 0
    next_step: int = 0
    cost: float = 0.0
    forgone: float = 0.0
    dearest: float = 0.0
    training: float = 0.0

    def __post_init__(self) -> None:
        if self.every is not None and self.every < 1:
            raise invalid("every", self.every, "an integer >= 1, or None for what budget= allows")
        if not self.budget > 0:
            raise invalid("budget", self.budget, "a number > 0, such as 0.05")

    @property
    def overhead(self) -> float:
        """What reports have cost, as a part of the training so far; NaN where that is not seen."""
        return self.cost / self.training if self.training else math.nan

    def is_due(self, step: int) -> bool:
        """Whether a report is made at this step."""
        return step % self.every == 0 if self.every is not None else step >= self.next_step

    def note(self, step: int, cost: float, training: float) -> None:
        """Note a report, and what the training has cost meanwhile; decides on the next step.

        Args:
            step: that of the report.
            cost: of the report, in gradients of one sample, over all processes.
            training: since the last report, likewise; 0 where it is not seen.
        """
        self.cost, self.dearest = self.cost + cost, max(self.dearest, cost)
        self.training += training
        self._wait(step)

    def forgo(self, step: int, cost: float, training: float) -> None:
        """Note that another report at this step had all of this one's, and go on as after one.

        Else what it saves would be spent at once, on a report that follows at its heels.

        Args:
            step, training: as for `note`.
            cost: what one of its own would have cost.
        """
        self.forgone, self.dearest = self.forgone + cost, max(self.dearest, cost)
        self.training += training
        self._wait(step)

    def _wait(self, step: int) -> None:
        steps = step + 1 - self.begin
        if not self.training > 0:
            self.postpone(step)
            return
        # The next one may cost as much as the dearest so far.
        cost = self.cost + self.forgone + self.dearest
        paid = cost / self.budget * steps / self.training
        self.next_step = math.ceil(max(step + 1, self.begin + paid) / ROUND) * ROUND

    def postpone(self, step: int) -> None:
        """Where nothing tells what to wait for, as after a report that failed: `EVERY` steps."""
        self.next_step = step + EVERY

    def state_dict(self) -> dict[str, Any]:
        """What decides on the next report, as numbers."""
        names = ("begin", "next_step", "cost", "forgone", "dearest", "training")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.begin, self.next_step = int(state["begin"]), int(state["next_step"])
        self.cost, self.dearest = float(state["cost"]), float(state["dearest"])
        self.training = float(state["training"])
        self.forgone = float(state.get("forgone", 0.0))
