"""One number for each seed of a branch, for comparisons of branches as dots."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from thalweg.analysis.claims.interval import Interval, seed_interval

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Dots:
    """A row of a dot plot.

    of_seed       seed -> value; not finite where the seed's training diverged
    against       the branch that the values are divided by; empty: none
    logarithmic   whether mean and interval are those of the logarithms; values are then > 0
    """

    branch: str
    of_seed: Mapping[int, float]
    against: str = ""
    logarithmic: bool = False

    @property
    def finite(self) -> list[float]:
        """The values that have a place on the axis."""
        least = 0.0 if self.logarithmic else -math.inf
        return [v for v in self.of_seed.values() if math.isfinite(v) and v > least]

    def interval(self) -> Interval | None:
        """Mean and 95 % t-interval over the finite seeds; None without one."""
        values = self.finite
        if not values:
            return None
        if not self.logarithmic:
            return seed_interval(values)
        of_logs = seed_interval([math.log(value) for value in values])
        return Interval(*map(_exponential, (of_logs.mean, of_logs.low, of_logs.high)))

    def rows(self, quantity: str) -> pd.DataFrame:
        """A row a seed: value, and mean and interval of the branch."""
        import pandas as pd

        interval = self.interval() or Interval(math.nan, math.nan, math.nan)
        return pd.DataFrame(
            {
                "quantity": quantity,
                "branch": self.branch,
                "divided_by": self.against,
                "seed": list(self.of_seed),
                "value": list(self.of_seed.values()),
                "mean": interval.mean,
                "interval_low": interval.low,
                "interval_high": interval.high,
            }
        )


def _exponential(value: float) -> float:
    """e^value; infinity where two far-apart seeds make the interval wider than a float holds."""
    return math.exp(value) if not value > 700 else math.inf
