"""How far the subspace could be trusted that a verdict rests on, as the tracker itself says.

Example:
    >>> import pandas as pd
    >>> rows = {"branch": ["trunk"] * 4, "subspace_error": [0.001, 0.002, 0.02, 0.001]}
    >>> subspace_caveat(pd.DataFrame(rows), {"trunk": 0.01})
    "the subspace missed its target of 1 % in 25 % of trunk's rows"
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from thalweg.spectrum.gap import CLOSED

if TYPE_CHECKING:
    import pandas as pd

WITHOUT_SUBSPACE = frozenset(
    ("loss", "test_loss", "test_accuracy", "minibatch_loss", "gradient_shares")
)
"""Columns that are what they are whichever subspace is followed."""
FEWEST = 0.05
"""A smaller fraction of a branch's rows is not worth a word: the row itself has its error."""


def subspace_caveat(data: pd.DataFrame, targets: Mapping[str, float]) -> str:
    """Which branches' subspaces missed the target, or were ill defined; "" where none did.

    Args:
        data: metric table with the column `branch`, as `thalweg.load` gives it.
        targets: for the error of each branch, as a fraction.
    """
    if "subspace_error" not in data.columns:
        return ""
    ill: list[str] = []
    missed: dict[float, list[str]] = {}
    for branch, rows in data.groupby("branch", sort=False, observed=True):
        errors = rows["subspace_error"].to_numpy(dtype=float)
        known = ~np.isnan(errors)
        if not known.any():
            continue
        closed = _closed(rows) & known
        target = targets[str(branch)]
        misses = (errors > target) & ~closed
        for found, where in ((missed.setdefault(target, []), misses), (ill, closed)):
            fraction = where.sum() / known.sum()
            if fraction >= FEWEST:
                found.append(f"{fraction:.0%} of {branch}'s rows".replace("%", " %"))
    parts = [
        f"the subspace missed its target of {100 * target:g} % in {', '.join(found)}"
        for target, found in missed.items()
        if found
    ]
    if ill:
        parts.append(f"the subspace is ill defined at this k in {', '.join(ill)}")
    return "; ".join(parts)


def _closed(rows: pd.DataFrame) -> np.ndarray:
    """Where lambda_{k+1}, as last seen, is about lambda_k; (n,)."""
    if not {"eigenvalues", "next_eigenvalue"} <= set(rows.columns):
        return np.zeros(len(rows), dtype=bool)
    last = [_last(values) for values in rows["eigenvalues"]]
    below = rows["next_eigenvalue"].to_numpy(dtype=float)
    return np.greater(below, CLOSED * np.array(last)) & (np.array(last) > 0)


def _last(values: object) -> float:
    """lambda_k of a row; NaN where it has none."""
    return float(values[-1]) if isinstance(values, (list, np.ndarray)) and len(values) else np.nan
