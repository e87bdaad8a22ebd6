"""Which facts does the page state in words and small tables: counts, cost of tracking, settings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from thalweg.analysis.claims.judgement import Verdict
from thalweg.analysis.claims.statistics import rows_where
from thalweg.analysis.claims.verdicts import number
from thalweg.analysis.figures.curves import branches_of, step_axis

if TYPE_CHECKING:
    import pandas as pd


def headline(
    data: pd.DataFrame, verdicts: Sequence[Verdict], roles: Mapping[str, str]
) -> dict[str, Any]:
    """Counts for the head of the page."""
    points = sorted(set(step_axis(data).branch_points.values()))
    start = f"{points[0]:,}" if points else ""
    if len(points) > 1:
        start += f"\N{EN DASH}{points[-1]:,}"
    return {
        "held": sum(verdict.outcome == "holds" for verdict in verdicts),
        "claims": len(verdicts),
        "seeds": len(set(data["seed"])),
        "branches": len([name for name in branches_of(data, roles) if name != "trunk"]),
        "branch_point": start,
        "last_step": f"{data['step'].to_numpy().max():,}",
    }


def costs(data: pd.DataFrame, roles: Mapping[str, str]) -> list[dict[str, str]]:
    """Mean cost and estimated error of the tracked subspace, branch by branch."""
    if "subspace_gradients" not in data.columns:
        return []
    rows = []
    for branch in branches_of(data, roles):
        table = rows_where(data, "branch", branch)
        counted = _finite(table, "subspace_gradients")
        if not len(counted):
            continue
        errors = _finite(table, "subspace_error")
        error = 100 * float(np.median(errors)) if len(errors) else math.nan
        rows.append(
            {
                "branch": branch,
                "cost": number(float(counted.mean())),
                "error": number(error) + (" %" if len(errors) else ""),
                "rows": f"{len(counted):,}",
            }
        )
    return rows


def flattened(entries: Mapping[str, object], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Names and values of nested settings, names joined by dots."""
    for key, value in entries.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from flattened(value, f"{name}.")
        elif isinstance(value, (list, tuple)):
            yield name, ", ".join(map(str, value))
        else:
            yield name, str(value)


def _finite(table: pd.DataFrame, column: str) -> np.ndarray:
    """Measured values of a column; none where there is no such column."""
    if column not in table.columns:
        return np.empty(0)
    values = table[column].to_numpy(dtype=np.float64)
    return values[np.isfinite(values)]
