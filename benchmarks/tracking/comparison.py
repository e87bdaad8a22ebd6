"""Costs at equal error: rows of a table, the frontier of a grid, and where a change stands."""

from __future__ import annotations

import csv
import math
import statistics
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Row:
    """What one variant reached at one setting, over all seeds."""

    regime: str
    change: str
    setting: str
    by_clock: bool
    median: float
    error: float
    counted: float
    measured: float
    renewed: float
    relative_cost: float = math.nan


def frontier(rows: list[Row]) -> tuple[np.ndarray, np.ndarray]:
    """Errors and costs of the grid that nothing else of it undercuts in both, by error."""
    grid = sorted((row.error, row.counted) for row in rows if row.change == "by clock")
    best = [p for i, p in enumerate(grid) if all(p[1] < other[1] for other in grid[:i])]
    errors, costs = np.array(best).T
    return errors, costs


def relative_costs(rows: list[Row]) -> list[Row]:
    """Each row's cost over that of the frontier at its error; a change's over that unchanged."""
    errors, costs = frontier(rows)

    def over_frontier(row: Row) -> float:
        if not errors[0] <= row.error <= errors[-1]:
            return math.nan
        return row.counted / math.exp(np.interp(math.log(row.error), np.log(errors), np.log(costs)))

    unchanged = {r.setting: over_frontier(r) for r in rows if r.change.startswith("by ")}
    return [
        replace(
            row,
            relative_cost=over_frontier(row)
            / (1 if row.change.startswith("by ") else unchanged[row.setting]),
        )
        for row in rows
    ]


def of_change(rows: list[Row], change: str, by_clock: bool) -> float:
    """The geometric mean of a change's relative costs; NaN where there are none."""
    costs = [r.relative_cost for r in rows if r.change == change and r.by_clock == by_clock]
    costs = [cost for cost in costs if not math.isnan(cost)]
    return statistics.geometric_mean(costs) if costs else math.nan


def save(rows: list[Row], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(asdict(rows[0])))
        writer.writeheader()
        for row in rows:
            named = {n: f"{v:.5g}" if isinstance(v, float) else v for n, v in asdict(row).items()}
            writer.writerow(named)


def load(path: Path) -> list[Row]:
    """What `save` wrote."""
    kinds = {"str": str, "float": float, "bool": lambda word: word == "True"}
    with path.open(newline="") as file:
        return [
            Row(**{field.name: kinds[str(field.type)](row[field.name]) for field in fields(Row)})
            for row in csv.DictReader(file)
        ]
