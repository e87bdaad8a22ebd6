"""Metric tables of a few branches with given columns, for tests of one claim at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd

from thalweg import registry
from thalweg.analysis.claims import ClaimUse, Verdict, judge

SEEDS, LENGTH, EVERY = 3, 200, 5
#: The claims that every built-in spec of the main study judges.
MAIN_NAMES = ("gradient-aligns", "dominant-stalls", "bulk-suffices", "spectrum-gap")
Column = float | Callable[[np.ndarray], np.ndarray]


def falling(end: float, start: float = 1.0) -> Callable[[np.ndarray], np.ndarray]:
    """A column that goes geometrically from `start` to `end`, over part in [0, 1]."""
    return lambda part: start * (end / start) ** part


def table(spread: float = 0.01, first: int = 100, **branches: Mapping[str, Column]) -> pd.DataFrame:
    """Rows of each branch (its name with _ for -), with seeds apart by a factor of exp(spread).

    Branches differ in the sign of their spread, so that ratios of them spread too. The first row is
    the branch point: common to all branches and seeds.
    """
    steps = np.arange(first, first + LENGTH + 1, EVERY)
    part = (steps - first) / LENGTH
    frames = []
    for seed in range(SEEDS):
        for number, (name, columns) in enumerate(branches.items()):
            factor = np.where(part > 0, np.exp(spread * (seed - 1) * (-1) ** number), 1.0)
            values = {
                column: (value(part) if callable(value) else np.full(len(part), value)) * factor
                for column, value in columns.items()
            }
            frames.append(
                pd.DataFrame(
                    {"seed": seed, "branch": name.replace("_", "-"), "step": steps, **values}
                )
            )
    return pd.concat(frames, ignore_index=True)


def verdict_of(name: str, data: pd.DataFrame, **roles: str) -> Verdict:
    """The verdict of a registered claim, judged for the branches named."""
    return judge(ClaimUse(registry.claims[name], roles), data)


def change(data: pd.DataFrame, where: pd.Series, column: str, value: object) -> pd.DataFrame:
    """A copy of the table with one column replaced in some rows."""
    changed = data.copy()
    changed.loc[where, column] = value
    return changed


def without(data: pd.DataFrame, where: pd.Series, *columns: str) -> pd.DataFrame:
    """A copy of the table in which columns are NaN in some rows."""
    changed = data.copy()
    changed.loc[where, list(columns)] = np.nan
    return changed
