"""Curves of a measured quantity along the steps: mean over seeds, lowest and highest seed.

They are made from the metric table, on an axis of steps that all seeds have in common. The figures
for papers and the interactive report draw the same curves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from thalweg.analysis.claims.statistics import rows_where
from thalweg.analysis.figures.branch_style import in_order
from thalweg.analysis.quantities import Quantity
from thalweg.errors import invalid

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    Vector = NDArray[np.float64]

#: Rows of one run -> steps and values of a quantity, both (rows,).
Series = Callable[["pd.DataFrame"], tuple["Vector", "Vector"]]


class Drawn(Protocol):
    """Anything that a figure draws and whose numbers it leaves in a CSV file."""

    def rows(self, quantity: str) -> pd.DataFrame:
        """The numbers as a table, with the name of the quantity and the branch."""
        ...


@dataclass(frozen=True)
class Curve:
    """A quantity along one branch.

    steps            (n,), on the axis of the study
    center           (n,), mean over seeds; geometric where the quantity is drawn on a log axis
    low, high        (n,), lowest and highest seed
    of_seed          seed -> (n,), NaN outside the steps that this seed has
    """

    branch: str
    steps: Vector
    center: Vector
    low: Vector
    high: Vector
    of_seed: Mapping[int, Vector]

    def since(self, step: float) -> Curve:
        """The part of the curve from a step on (the last point stays in any case)."""
        kept = self.steps >= min(step, self.steps[-1])
        return Curve(
            self.branch,
            self.steps[kept],
            self.center[kept],
            self.low[kept],
            self.high[kept],
            {seed: values[kept] for seed, values in self.of_seed.items()},
        )

    def rows(self, quantity: str) -> pd.DataFrame:
        """A row a step: mean, lowest and highest seed."""
        import pandas as pd

        return pd.DataFrame(
            {
                "quantity": quantity,
                "branch": self.branch,
                "step": self.steps,
                "mean": self.center,
                "lowest_seed": self.low,
                "highest_seed": self.high,
                "seeds": len(self.of_seed),
            }
        )


@dataclass(frozen=True)
class StepAxis:
    """The horizontal axis: training steps if all seeds branch at one step, else steps after it.

    Under the paper's switch rule each seed has its own branch point; a mean over seeds at equal
    training steps would then mix steps before and after it.
    """

    branch_points: Mapping[int, int]
    shared: bool

    @property
    def label(self) -> str:
        """Axis title."""
        return "training step" if self.shared else "steps after the branch point"

    @property
    def branch_point(self) -> float | None:
        """Where the branch point is on the axis; None without branches."""
        if not self.branch_points:
            return None
        return float(next(iter(self.branch_points.values()))) if self.shared else 0.0

    def origin(self, seed: int) -> int:
        """Training step of this seed at the axis's zero."""
        return 0 if self.shared else self.branch_points.get(seed, 0)


def step_axis(data: pd.DataFrame) -> StepAxis:
    """Axis of a study: looks up at which step the branches of each seed begin."""
    branches = data[data["branch"] != "trunk"]
    if "trunk" not in set(data["branch"]):
        return StepAxis({}, shared=True)
    first = branches.groupby("seed")["step"].min()
    points = {int(seed): int(step) for seed, step in first.items()}  # type: ignore[arg-type]
    return StepAxis(points, shared=len(set(points.values())) <= 1)


def branches_of(data: pd.DataFrame, roles: Mapping[str, str]) -> list[str]:
    """Names of the branches in the table, trunk included, in the order they are shown."""
    return in_order(map(str, data["branch"].unique()), roles)


def seed_tables(data: pd.DataFrame, branch: str) -> dict[int, pd.DataFrame]:
    """The rows of a branch, seed by seed, in order of steps."""
    rows = rows_where(data, "branch", branch)
    return {
        int(seed): table.sort_values("step")  # type: ignore[arg-type]
        for seed, table in rows.groupby("seed")
    }


def series_of(quantity: Quantity, window: float | None = None) -> Series:
    """How a quantity of numbers is computed from the rows of a run.

    window   in place of the quantity's own
    """
    part = quantity.window if window is None else window
    if quantity.columns:
        return effective_rate(*quantity.columns, part)
    return column(quantity.name, part)


def column(name: str, window: float = 0.0) -> Series:
    """A column of the metric table; `window` > 0 takes a running mean over that part of the run."""

    def series(table: pd.DataFrame) -> tuple[Vector, Vector]:
        steps, values = _known(table, table[name].to_numpy(dtype=np.float64))
        return steps, running_sum(values, window) / running_sum(np.ones_like(values), window)

    return series


def effective_rate(numerator: str, denominator: str, window: float) -> Series:
    """Effective learning rate over a window: sum of one column over that of another."""
    from thalweg.measure.effective_learning_rate import ratio_of_sums

    def series(table: pd.DataFrame) -> tuple[Vector, Vector]:
        above = table[numerator].to_numpy(dtype=np.float64)
        below = table[denominator].to_numpy(dtype=np.float64)
        steps, both = _known(table, np.stack([above, below], axis=1))
        sums = running_sum(both[:, 0], window), running_sum(both[:, 1], window)
        return steps, np.array(list(map(ratio_of_sums, *sums)), dtype=np.float64)

    return series


def entry(name: str, index: int) -> Series:
    """One entry of a column that holds lists, such as the i-th eigenvalue."""

    def series(table: pd.DataFrame) -> tuple[Vector, Vector]:
        values = [
            float(row[index])
            if row is not None and np.ndim(row) == 1 and len(row) > index
            else math.nan
            for row in table[name]
        ]
        return _known(table, np.array(values, dtype=np.float64))

    return series


def list_length(data: pd.DataFrame, name: str) -> int:
    """Length of the longest list in a column; 0 where there is none."""
    return max((len(row) for row in data[name] if row is not None and np.ndim(row) == 1), default=0)


def running_sum(values: Vector, window: float) -> Vector:
    """Sum over a centred window of odd length, cut off at the ends: (n,) -> (n,).

    window   length of the window as a part of n; below three rows nothing is summed
    """
    half = math.ceil(window * len(values)) // 2
    total = np.concatenate([[0.0], np.cumsum(values)])
    rows = np.arange(len(values))
    upper, lower = np.minimum(rows + half + 1, len(values)), np.maximum(rows - half, 0)
    return total[upper] - total[lower]


def curve(
    data: pd.DataFrame, branch: str, series: Series, axis: StepAxis, *, logarithmic: bool = False
) -> Curve | None:
    """The quantity along one branch over all seeds; None where it was never measured.

    Seeds measured at other steps than the first one are interpolated linearly between their own
    rows (only needed where seeds branch at different steps). It begins where all seeds have begun.
    """
    rows = rows_where(data, "branch", branch)
    runs: dict[int, tuple[Vector, Vector]] = {}
    for seed in sorted(int(seed) for seed in rows["seed"].unique()):
        steps, values = series(rows_where(rows, "seed", seed).sort_values("step"))
        if len(steps):
            runs[seed] = steps - axis.origin(seed), values
    if not runs:
        return None
    grid = max((steps for steps, _ in runs.values()), key=len)
    of_seed = {
        seed: np.interp(grid, steps, values, left=math.nan, right=math.nan)
        for seed, (steps, values) in runs.items()
    }
    stacked = np.stack(list(of_seed.values()))
    if logarithmic:
        stacked = np.where(stacked > 0, stacked, math.nan)
    # From where all seeds have begun: one that enters later would make the mean jump.
    begun = max(steps[0] for steps, _ in runs.values())
    kept = ~np.isnan(stacked).all(axis=0) & (grid >= begun)
    if not kept.any():
        return None
    shown = stacked[:, kept]
    center = np.exp(np.nanmean(np.log(shown), axis=0)) if logarithmic else np.nanmean(shown, axis=0)
    return Curve(
        branch=branch,
        steps=grid[kept],
        center=center,
        low=np.nanmin(shown, axis=0),
        high=np.nanmax(shown, axis=0),
        of_seed=dict(zip(of_seed, shown, strict=True)),
    )


def tidy(curves: Mapping[str, Drawn | None]) -> pd.DataFrame:
    """What a figure draws as one table: quantity, branch, and the numbers.

    Raises InvalidInput where nothing has a value.
    """
    import pandas as pd

    frames = [drawn.rows(name.partition("|")[0]) for name, drawn in curves.items() if drawn]
    if not frames:
        raise invalid("figure data", "nothing measured", "at least one measured value")
    return pd.concat(frames, ignore_index=True)


def _known(table: pd.DataFrame, values: Vector) -> tuple[Vector, Vector]:
    """Rows whose value (or values) are finite."""
    finite = np.isfinite(values) if values.ndim == 1 else np.isfinite(values).all(axis=1)
    return table["step"].to_numpy(dtype=np.float64)[finite], values[finite]
