"""Full reports and, between them, quick rows: each a tier with its probes and its spacing.

A full report asks for the subspace, which costs tens of gradients. A quick row has what a few
forward passes and a gradient tell. The tiers divide the budget, so that together they keep it:

    quick rows   `QUICK_SHARE` of the budget
    full reports the rest

A full report has all the numbers of a quick row too, so those make one series.

Example:
    >>> full, quick = tiers(every=None, quick_every=None, budget=0.06)
    >>> full.spacing.budget, round(quick.spacing.budget, 3)
    (0.04, 0.02)
    >>> [tier.name for tier in tiers(every=100, quick_every=None, budget=0.06)]
    ['full']
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from thalweg.errors import invalid
from thalweg.measure.effective_learning_rate import effective_learning_rate
from thalweg.measure.probes import Probe
from thalweg.measure.report_spacing import ReportSpacing
from thalweg.measure.step_state import StepState
from thalweg.registry import probes

QUICK_SHARE = 1 / 3
"""Of the budget, for quick rows.

Full reports then come one and a half times as far apart as without quick rows. One costs 8 to 21
times a quick row (docs/watch.md), so that there are 4 to 10 quick rows to each: a smaller part
would show less, and with a larger one it is the sharpness that comes rarely.
"""

FULL = (
    "loss",
    "sharpness",
    "alignment_gradient",
    "alignment_minibatch",
    "alignment_update",
    "effective_learning_rates",
    "subspace_cost",
)
"""The probes that a full report asks."""

QUICK = ("loss", "step_as_a_whole", "critical_sharpness", "gradient_noise_scale")
"""The probes that a quick row asks."""

QUICK_GRADIENTS = 2.5
"""What a quick row is counted as where a loss does not count: see docs/watch.md."""

WINDOW = 10
"""Rows that an effective learning rate is taken over: one of a step is ruled by its noise."""

MOST_FAILURES = 3
"""Failures in a row after which a tier ends: what failed so often is not passing."""


@dataclass
class Tier:
    """One kind of rows of a watched training.

    Attributes:
        name: "full" or "quick".
        probes: what it asks of a step.
        spacing: when it is due.
        parts: the parts of the update whose effective learning rates it has, as endings of columns.
        failures: in a row, by now.
        unpaid: what its rows have cost that `spacing` has not heard of yet, such as one that
            failed, in `PARTS` of a gradient.
        recent: its last `WINDOW` rows, those that failed among them.
    """

    name: str
    probes: tuple[Probe, ...]
    spacing: ReportSpacing
    parts: tuple[str, ...]
    failures: int = 0
    unpaid: int = 0
    recent: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=WINDOW))

    @property
    def kind(self) -> str:
        """What one of its rows is called in a message."""
        return "report" if self.needs_subspace else "quick row"

    @property
    def needs_subspace(self) -> bool:
        """Whether its probes ask for the dominant subspace."""
        return self.name == "full"

    @property
    def ended(self) -> bool:
        """Whether it has failed so often in a row that it is not tried again."""
        return self.failures >= MOST_FAILURES

    def is_due(self, step: int) -> bool:
        """Whether it is asked at this step."""
        return not self.ended and self.spacing.is_due(step)

    def measure(self, state: StepState) -> dict[str, Any]:
        """What its probes say of a step, by column."""
        row: dict[str, Any] = {}
        for probe in self.probes:
            row.update(probe.measure(state))
        return row

    def effective_rates(self, row: Mapping[str, Any]) -> dict[str, float | None]:
        """Its effective learning rates: ratios of sums over the recent rows, this one included."""
        self.recent.append(dict(row))
        rates: dict[str, float | None] = {}
        for part in self.parts:
            numerators, denominators = (
                [recent.get(f"lr_{side}{part}") for recent in self.recent]
                for side in ("numerator", "denominator")
            )
            rate = effective_learning_rate(numerators, denominators)
            rates[f"effective_lr{part}"] = rate if math.isfinite(rate) else None
        return rates

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides on its next rows."""
        return {
            "spacing": self.spacing.state_dict(),
            "failures": self.failures,
            "unpaid": self.unpaid,
            "recent": [row.copy() for row in self.recent],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.spacing.load_state_dict(state["spacing"])
        self.failures, self.unpaid = state["failures"], state.get("unpaid", 0)
        self.recent.clear()
        self.recent.extend(dict(row) for row in state["recent"])


def tiers(
    *,
    every: int | None,
    quick_every: int | None,
    budget: float,
    begin: int = 0,
    further: Sequence[Probe] = (),
) -> list[Tier]:
    """The tiers of a watched training, the dearest first.

    Args:
        every, budget, begin: as for `ReportSpacing`.
        quick_every: quick rows at steps 0, quick_every, ...; 0 for none; None for as often as their
            part of the budget allows, where that spaces the reports as well, and else for none.
        further: probes that are asked as well, each in the cheapest tier that it fits.

    Raises:
        InvalidInput: `every` < 1, `quick_every` < 0, a budget that is not positive.
    """
    if quick_every is not None and quick_every < 0:
        raise invalid("quick_every", quick_every, "an integer >= 0, or None", "0 for no quick rows")
    if isinstance(budget, bool) or not isinstance(budget, Real) or not budget > 0:
        raise invalid("budget", budget, "a number > 0, such as 0.05")
    none = quick_every == 0 or (quick_every is None and every is not None)
    shares = not none and quick_every is None
    quick = () if none else tuple(each for each in further if each.quick)
    full = tuple(each for each in further if each not in quick)
    spacing = ReportSpacing(every, budget * (1 - QUICK_SHARE) if shares else budget, begin, begin)
    found = [Tier("full", _named(FULL, full), spacing, ("_dominant", "_bulk"))]
    if not none:
        spacing = ReportSpacing(quick_every, budget * QUICK_SHARE, begin, begin)
        found.append(Tier("quick", _named(QUICK, quick), spacing, ("",)))
    return found


def _named(names: Sequence[str], further: Sequence[Probe]) -> tuple[Probe, ...]:
    """The probes of these names, then the others, each once."""
    return tuple(dict.fromkeys((*(probes[name] for name in names), *further)))
