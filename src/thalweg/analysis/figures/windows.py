"""Which rows of a run count: the last part of it, or the steps that two branches have both."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from thalweg.analysis.claims.statistics import rows_where

if TYPE_CHECKING:
    import pandas as pd


def seed_tables(data: pd.DataFrame, branch: str) -> dict[int, pd.DataFrame]:
    """The rows of a branch, seed by seed, in order of steps."""
    rows = rows_where(data, "branch", branch)
    return {
        int(seed): table.sort_values("step")  # type: ignore[arg-type]
        for seed, table in rows.groupby("seed")
    }


def mean_since(table: pd.DataFrame, name: str, part: float) -> float:
    """Mean of a column over the last part of a run; NaN where it was never measured there."""
    steps = table["step"].to_numpy(dtype=np.float64)
    values = table[name].to_numpy(dtype=np.float64)
    late = values[steps >= steps[-1] - part * (steps[-1] - steps[0])]
    known = late[~np.isnan(late)]
    return float(known.mean()) if len(known) else math.nan


def ratio_of_means(
    table: pd.DataFrame, other: pd.DataFrame, name: str, part: float
) -> float | None:
    """Mean of a column over that of another branch, both over the last part of their common steps.

    Infinite where the first one stops being finite there. None where no step is common to both.
    """
    of_both = [
        (rows["step"].to_numpy(dtype=np.float64), rows[name].to_numpy(dtype=np.float64))
        for rows in (table, other)
    ]
    first = max(steps[0] for steps, _ in of_both)
    last = min(steps[-1] for steps, _ in of_both)
    if last <= first:
        return None
    start = last - part * (last - first)
    means = [float(values[(steps >= start) & (steps <= last)].mean()) for steps, values in of_both]
    if not math.isfinite(means[1]) or means[1] <= 0:
        return None
    return means[0] / means[1] if math.isfinite(means[0]) else math.inf
