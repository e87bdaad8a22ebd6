"""How far a mean over seeds can be trusted: Student's t-interval.

The quantile is computed here because SciPy is not a dependency of the package; a test compares it
with SciPy's.

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


def central_probability(angle: float, degrees: int) -> float:
    """P(|T| < t) for t = sqrt(degrees) tan(angle), T of Student's distribution.

    Exact finite sums for whole degrees of freedom: Abramowitz and Stegun 1964, 26.7.3 (odd) and
    26.7.4 (even).
    """
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2 == 1
    term = cosine if odd else 1.0
    total = 0.0
    for j in range((degrees - 1) // 2 if odd else degrees // 2):
        total += term
        factor = (2 * j + 2) / (2 * j + 3) if odd else (2 * j + 1) / (2 * j + 2)
        term *= factor * cosine**2
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def t_quantile(level: float, degrees: int) -> float:
    """The t with P(|T| < t) = level, for a whole number of degrees of freedom >= 1.

    Raises InvalidInput for a level outside (0, 1) or degrees < 1.
    """
    if not 0 < level < 1:
        raise invalid("level", level, "a number between 0 and 1", "0.95 is usual")
    if degrees < 1:
        raise invalid("degrees of freedom", degrees, "an integer >= 1")
    low, high = 0.0, math.pi / 2
    # Bisection on the angle, not on t: its range is bounded for every level. 60 halvings exhaust
    # double precision.
    for _ in range(60):
        middle = (low + high) / 2
        if central_probability(middle, degrees) < level:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees) * math.tan((low + high) / 2)


def seed_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """mean +- t * s / sqrt(n), s the standard deviation with n - 1; one value has no interval.

    The ends are NaN for a single value. Raises InvalidInput for no value at all.
    """
    count = len(values)
    if count == 0:
        raise invalid("values", list(values), "at least one number")
    mean = math.fsum(values) / count
    if count == 1:
        return Interval(mean, math.nan, math.nan)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    reach = t_quantile(level, count - 1) * math.sqrt(variance / count)
    return Interval(mean, mean - reach, mean + reach)
