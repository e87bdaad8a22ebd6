"""Branches compared: a row a branch, seeds as dots, their mean and 95 % t-interval as a bar."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from thalweg.analysis.claims.interval import Interval, seed_interval
from thalweg.analysis.figures import drawing

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from thalweg.analysis.figures.drawing import Look


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


#: Height of a row and of all that is no row, in inches.
_ROW, _REST = 0.165, 0.75


@dataclass(frozen=True)
class Mark:
    """Look of one kind of dot; `hollow` shows only its outline."""

    colour: str
    shape: str = "o"
    hollow: bool = False


@dataclass(frozen=True)
class DotRow:
    """One row: a heading alone, or a label with one or more kinds of dots side by side."""

    label: str
    dots: Sequence[tuple[Dots, Mark]] = ()


def rows_of_branches(
    dots: Mapping[str, Dots | None], marks: Mapping[str, Mark], look: Look
) -> list[DotRow]:
    """A row a branch, with the dots of each kind side by side; dots are named `kind|branch`."""
    rows: dict[str, DotRow] = {}
    for name, drawn in dots.items():
        kind, _, branch = name.partition("|")
        row = rows.setdefault(branch, DotRow(look.styles[branch].label))
        if drawn is not None and kind in marks:
            rows[branch] = DotRow(row.label, [*row.dots, (drawn, marks[kind])])
    return list(rows.values())


def size_of_rows(rows: int, marks: int = 1) -> tuple[float, float]:
    """Width and height of a dot plot; with two kinds of dots rows are higher."""
    return drawing.COLUMN_WIDTH, _REST + _ROW * rows * (1.0 if marks == 1 else 1.5)


def draw_rows(axes: Axes, rows: Sequence[DotRow], *, logarithmic: bool, line: float | None) -> None:
    """Draw the rows from top to bottom on a horizontal axis; `line`: a value that matters."""
    if logarithmic:
        axes.set_xscale("log")
    for place, row in enumerate(rows):
        for index, (dots, mark) in enumerate(row.dots):
            _draw_dots(axes, dots, mark, place + 0.3 * (index - (len(row.dots) - 1) / 2))
    if line is not None:
        axes.axvline(line, color=drawing.INK, linewidth=0.6, linestyle=(0, (5, 2)), zorder=0)
    limits = _limits([dots for row in rows for dots, _ in row.dots], logarithmic, line)
    if limits is not None:
        axes.set_xlim(*limits)
    # Half a row of space at both ends; the first row is the topmost.
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), [row.label for row in rows], fontsize=8)
    axes.tick_params(axis="y", length=0)
    for text, row in zip(axes.get_yticklabels(), rows, strict=True):
        if not row.dots:
            text.set(fontstyle="italic", color="#555555")
    axes.spines["left"].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.5)
    axes.set_axisbelow(True)
    if logarithmic:
        drawing.plain_log_ticks(axes, horizontal=True)


def _limits(
    all_dots: Sequence[Dots], logarithmic: bool, line: float | None
) -> tuple[float, float] | None:
    """Ends of the axis: all seeds, and the intervals as far as half the width of these.

    The interval of two seeds can be a hundred times wider than all that was measured.
    """
    place = math.log if logarithmic else float
    values = [place(value) for dots in all_dots for value in dots.finite]
    if not values:
        return None
    if line is not None:
        values.append(place(line))
    low, high = min(values), max(values)
    reach = (high - low) / 2 or 0.1
    intervals = [interval for dots in all_dots if (interval := dots.interval()) is not None]
    ends = [end for interval in intervals for end in (interval.low, interval.high)]
    drawn = [place(end) for end in ends if math.isfinite(end) and (end > 0 or not logarithmic)]
    near = [min(max(end, low - reach), high + reach) for end in drawn]
    low, high = min([low, *near]), max([high, *near])
    margin = 0.04 * (high - low) or 0.1
    back = math.exp if logarithmic else float
    return back(low - margin), back(high + margin)


def _draw_dots(axes: Axes, dots: Dots, mark: Mark, place: float) -> None:
    values = dots.finite
    interval = dots.interval()
    if interval is not None:
        if len(values) > 1:
            axes.plot(
                [interval.low, interval.high],
                [place, place],
                color=mark.colour,
                linewidth=3.2,
                alpha=0.3,
                solid_capstyle="butt",
                zorder=1,
            )
            axes.plot(
                interval.mean, place, "|", color=mark.colour, markersize=7.5, markeredgewidth=1.3
            )
        axes.plot(
            values,
            [place] * len(values),
            linestyle="none",
            marker=mark.shape,
            markersize=3.4,
            markeredgewidth=0.8,
            markeredgecolor=mark.colour,
            markerfacecolor="white" if mark.hollow else mark.colour,
            alpha=0.9,
            zorder=3,
        )
    lost = len(dots.of_seed) - len(values)
    if lost:
        axes.annotate(
            f"{lost} of {len(dots.of_seed)} diverged",
            (1.0, place),
            xycoords=("axes fraction", "data"),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
            color=mark.colour,
            annotation_clip=False,
        )


def name_marks(axes: Axes, marks: Mapping[str, Mark]) -> None:
    """A legend of the kinds of dots above the rows."""
    from matplotlib.lines import Line2D

    axes.legend(
        handles=[
            Line2D(
                [],
                [],
                linestyle="none",
                marker=mark.shape,
                markersize=4,
                markeredgecolor=mark.colour,
                markerfacecolor="white" if mark.hollow else mark.colour,
                label=text,
            )
            for text, mark in marks.items()
        ],
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=len(marks),
        frameon=False,
        handletextpad=0.1,
        columnspacing=1.2,
        borderaxespad=0.1,
    )
