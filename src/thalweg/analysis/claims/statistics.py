"""The statistics of claims: what they read of a branch, and those that several claims share.

A column may be measured every n steps only; what was not measured is NaN. A run that diverged ends
with a row in which nothing is known, not even the loss. The functions at the end make a statistic
that several claims share from the names of its columns.

Example:
    >>> chi_of_calm_over_noisy = late_ratio("alignment_gradient", "calm", "noisy")
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from thalweg.analysis.claims.claim import (
    Measurement,
    NonFiniteError,
    NotMeasurableError,
    SeedTables,
)

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    Vector = NDArray[np.float64]

#: Part of a branch's rows over which a value at its end is averaged.
END_WINDOW = 0.10
#: A branch that others are compared with must lower its loss by this factor at least.
LEAST_DECREASE = 1.02
_NOT_MEASURED = ("seed", "branch", "step", "learning_rate")


def rows_where(data: pd.DataFrame, column: str, value: object) -> pd.DataFrame:
    """The rows in which a column has this value."""
    return data.loc[data[column] == value, :]  # type: ignore[return-value]


def stops_by_divergence(table: pd.DataFrame) -> bool:
    """Whether a branch's last row has a loss of NaN and nothing else: a run writes it so."""
    if "loss" not in table.columns:
        return False
    last = table.iloc[-1]
    return bool(last.drop([name for name in _NOT_MEASURED if name in table.columns]).isna().all())


def rows(seed: SeedTables, role: str) -> pd.DataFrame:
    """Rows of the branch in this role; raises NonFiniteError where its run diverged."""
    table = seed.table(role)
    if stops_by_divergence(table):
        end = int(table["step"].iloc[-1])
        raise NonFiniteError(
            f"loss of {seed.names[role]} becomes non-finite: diverged at step {end}"
        )
    return table


def measured(seed: SeedTables, role: str, *columns: str) -> tuple[Vector, ...]:
    """Steps, then each column's values, in the rows where all of them were measured: (rows,) each.

    Raises NotMeasurableError where nothing was measured; NonFiniteError where a value is infinite,
    or the values stop well before the branch does: divergence leaves NaN from there on.
    """
    table = rows(seed, role)
    values = [table[column].to_numpy(dtype=np.float64) for column in columns]
    return _known(table, values, f"{', '.join(columns)} of {seed.names[role]}")


def measured_entry(seed: SeedTables, role: str, column: str, index: int) -> tuple[Vector, Vector]:
    """Steps, and one entry of a column of lists, where it was measured; raises as `measured`."""
    table = rows(seed, role)
    values = [
        float(row[index]) if np.ndim(row) == 1 and len(row) > index else math.nan
        for row in table[column]
    ]
    what = f"{column} of {seed.names[role]}"
    steps, found = _known(table, [np.array(values, dtype=np.float64)], what)
    return steps, found


def _known(table: pd.DataFrame, values: list[Vector], what: str) -> tuple[Vector, ...]:
    """Steps, then the values, in the rows where all are known; raises as `measured` does."""
    steps = table["step"].to_numpy(dtype=np.float64)
    known = ~np.isnan(values).any(axis=0)
    if not known.any():
        raise NotMeasurableError(f"{what} was not measured")
    kept, values = steps[known], [column[known] for column in values]
    spacing = float(np.diff(kept).max()) if len(kept) > 1 else 0.0
    # Update columns lack the last row by design, and a slower probe misses up to its own spacing.
    silent = steps[-1] - kept[-1] > 2 * max(spacing, float(np.diff(steps[-2:]).sum()))
    if silent or not np.isfinite(values).all():
        raise NonFiniteError(f"{what} becomes non-finite after step {kept[-1]:.0f}")
    return kept, *values


def late_half(seed: SeedTables, role: str, *columns: str) -> tuple[Vector, ...]:
    """Each column's values in the last half of the branch's steps; raises as `measured` does."""
    steps, *values = measured(seed, role, *columns)
    late = steps >= (steps[0] + steps[-1]) / 2
    return tuple(column[late] for column in values)


def last_tenth(values: Vector) -> float:
    """Mean over the last tenth of the rows, one row at least."""
    return float(values[-math.ceil(END_WINDOW * len(values)) :].mean())


def start_and_end(seed: SeedTables, role: str, column: str = "loss") -> tuple[float, float]:
    """A column at the branch point, and its mean over the last tenth of the measured rows."""
    _, values = measured(seed, role, column)
    return float(values[0]), last_tenth(values)


def require_same_start(seed: SeedTables, *roles: str) -> None:
    """Raise NotMeasurableError unless branches begin at one loss (rounding aside)."""
    starts = [float(measured(seed, role, "loss")[1][0]) for role in roles]
    if not all(math.isclose(starts[0], start, rel_tol=1e-3) for start in starts):
        listed = ", ".join(f"{start:.6g}" for start in starts)
        raise NotMeasurableError(f"branches start at different losses ({listed})")


def require_progress(seed: SeedTables, role: str) -> None:
    """Raise NotMeasurableError where a branch's loss does not fall: nothing to compare with."""
    start, end = start_and_end(seed, role)
    if min(start, end) <= 0 or start / end < LEAST_DECREASE:
        raise NotMeasurableError(
            f"the loss of {seed.names[role]} goes from {start:.4g} to {end:.4g}: "
            "no decrease to compare with"
        )


def ratio(upper: float, lower: float, what: str) -> float:
    """upper / lower; raises NotMeasurableError unless upper >= 0 and lower > 0."""
    if not (upper >= 0 and lower > 0):
        raise NotMeasurableError(f"{what} of {upper:.3g} over {lower:.3g} is no ratio")
    return upper / lower


def log_ratio(upper: float, lower: float, what: str) -> float:
    """log(upper / lower); raises NotMeasurableError unless both are positive."""
    if not (upper > 0 and lower > 0):
        raise NotMeasurableError(f"{what} of {upper:.3g} over {lower:.3g} has no log-ratio")
    return math.log(upper / lower)


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
