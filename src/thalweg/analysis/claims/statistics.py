"""Statistics that several claims share; each function makes one from the names of its columns.

Example:
    >>> chi_of_calm_over_noisy = late_ratio("alignment_gradient", "calm", "noisy")
"""

from __future__ import annotations

from collections.abc import Callable

from thalweg.analysis.claims.claim import Measurement, SeedTables
from thalweg.analysis.claims.rows import (
    late_half,
    measured,
    ratio,
    require_same_start,
    start_and_end,
)

Statistic = Callable[[SeedTables], Measurement]


def late_mean(column: str, role: str = "plain") -> Statistic:
    """Mean of a column over the last half of a branch."""

    def measure(seed: SeedTables) -> Measurement:
        (values,) = late_half(seed, role, column)
        return Measurement(
            float(values.mean()), {"lowest single step of the late window": float(values.min())}
        )

    return measure


def whole_mean(column: str, role: str = "plain") -> Statistic:
    """Mean of a column over a whole branch."""

    def measure(seed: SeedTables) -> Measurement:
        _, values = measured(seed, role, column)
        return Measurement(
            float(values.mean()), {"lowest single step of the branch": float(values.min())}
        )

    return measure


def late_deviation(column: str, target: float, role: str = "plain") -> Statistic:
    """abs(m / target - 1), m the mean of a column over the last half of a branch."""

    def measure(seed: SeedTables) -> Measurement:
        (values,) = late_half(seed, role, column)
        mean = float(values.mean())
        return Measurement(abs(mean / target - 1), {f"mean of {column}": mean})

    return measure


def late_ratio(column: str, upper: str, lower: str, *, same_start: bool = True) -> Statistic:
    """Mean of a column over the last half of the branch `upper` / the same of `lower`.

    same_start   the branches must begin at one checkpoint, seen by their losses
    """

    def measure(seed: SeedTables) -> Measurement:
        if same_start:
            require_same_start(seed, lower, upper)
        means = [float(late_half(seed, role, column)[0].mean()) for role in (upper, lower)]
        beside = {
            f"mean of {seed.names[role]}": mean
            for role, mean in zip((upper, lower), means, strict=True)
        }
        return Measurement(ratio(means[0], means[1], column), beside)

    return measure


def end_ratio(column: str, upper: str, lower: str) -> Statistic:
    """Mean of a column over the last tenth of the branch `upper` / the same of `lower`.

    The branches must begin at one checkpoint, seen by their losses.
    """

    def measure(seed: SeedTables) -> Measurement:
        require_same_start(seed, lower, upper)
        over, under = (start_and_end(seed, role, column)[1] for role in (upper, lower))
        beside = {f"end of {seed.names[lower]}": under, f"end of {seed.names[upper]}": over}
        return Measurement(ratio(over, under, column), beside)

    return measure
