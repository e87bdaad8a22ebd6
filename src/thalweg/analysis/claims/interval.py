"""Student's t-interval: how far a mean over seeds can be trusted.

Example:
    >>> interval = seed_interval([0.95, 0.96, 0.97])
    >>> f"{interval.mean:.2f} [{interval.low:.3f}, {interval.high:.3f}]"
    '0.96 [0.935, 0.985]'
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from thalweg.errors import invalid


@dataclass(frozen=True)
class Interval:
    """Mean of one number per seed with the ends of its two-sided interval."""

    mean: float
    low: float
    high: float


def seed_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """mean +- t * s / sqrt(n), s the standard deviation with n - 1; one value has no interval.

    The ends are NaN for a single value. Raises InvalidInput for no value at all, or a level outside
    (0, 1).
    """
    if not 0 < level < 1:
        raise invalid("level", level, "a number between 0 and 1", "0.95 is usual")
    count = len(values)
    if count == 0:
        raise invalid("values", list(values), "at least one number")
    mean = math.fsum(values) / count
    if count == 1:
        return Interval(mean, math.nan, math.nan)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    # What scipy.stats.t.ppf calls, without its import of 0.7 s.
    from scipy.special import stdtrit

    reach = float(stdtrit(count - 1, (1 + level) / 2)) * math.sqrt(variance / count)
    return Interval(mean, mean - reach, mean + reach)
