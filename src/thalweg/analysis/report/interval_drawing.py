"""Where do the seeds, their interval and the rule lie: a small drawing beside each verdict."""

from __future__ import annotations

import math
from dataclasses import dataclass

from thalweg.analysis.claims.judgement import Verdict

#: Width of the drawing in its own units; the page scales it.
WIDTH = 220.0


@dataclass(frozen=True)
class IntervalPlot:
    """Horizontal positions in [0, WIDTH].

    allowed     start and width of the side on which the claim holds
    interval    start and width of the interval over seeds; None where there is none
    """

    threshold: float
    allowed: tuple[float, float]
    mean: float
    interval: tuple[float, float] | None
    seeds: tuple[float, ...]


def interval_plot(verdict: Verdict) -> IntervalPlot | None:
    """Positions for the drawing, on a log axis for ratios; None where nothing finite is known."""
    values = [value for value in verdict.values.values() if _drawable(verdict, value)]
    if not values or not _drawable(verdict, verdict.mean):
        return None
    ends = [end for end in (verdict.low, verdict.high) if _drawable(verdict, end)]
    place = math.log if verdict.logarithmic else float
    marks = [place(mark) for mark in (*values, *ends, verdict.rule.threshold)]
    low, high = min(marks), max(marks)
    # A wide margin on both sides shows the rule as a region, not as the edge of the drawing.
    margin = 0.25 * (high - low) or 1.0
    low, high = low - margin, high + margin

    def position(value: float) -> float:
        return round((place(value) - low) / (high - low) * WIDTH, 1)

    threshold = position(verdict.rule.threshold)
    above = verdict.rule.direction == "above"
    allowed = (threshold, WIDTH - threshold) if above else (0.0, threshold)
    interval = None
    if len(ends) == 2:
        start, end = position(ends[0]), position(ends[1])
        interval = (start, max(end - start, 1.0))
    return IntervalPlot(
        threshold, allowed, position(verdict.mean), interval, tuple(map(position, values))
    )


def _drawable(verdict: Verdict, value: float) -> bool:
    return math.isfinite(value) and (value > 0 or not verdict.logarithmic)
