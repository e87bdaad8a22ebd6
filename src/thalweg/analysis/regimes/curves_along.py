"""A statistic against one setting: a line for each branch, or for each value of another setting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from thalweg.analysis.claims.judgement import DEFAULT_ROLES
from thalweg.analysis.figures.branch_style import branch_styles
from thalweg.analysis.figures.drawing import (
    COLUMN_WIDTH,
    INK,
    PAGE_WIDTH,
    in_mathtext,
    mark_value,
    plain_log_ticks,
)
from thalweg.analysis.figures.figure import NotDrawableError, SavedFigure, save_drawing
from thalweg.analysis.quantities import Quantity, quantities
from thalweg.analysis.regimes.plane import (
    MOST_PANELS,
    Axis,
    Panel,
    Plane,
    panels_in_a_row,
    panels_of,
    plain_text,
    statistic_of_points,
)
from thalweg.analysis.regimes.table import SweepTable
from thalweg.lab.store.folders import TRUNK

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

_SHAPES = "osD^vP*X"
_MOST_TICKS = 8


@dataclass(frozen=True)
class _Line:
    """One line: the rows of its points, by the point, and how it looks."""

    label: str
    rows: dict[int, dict[str, Any]]
    colour: Any
    dash: Any = "solid"
    shape: str = "o"


@dataclass(frozen=True)
class _Curves:
    """A figure of lines in panels."""

    plane: Plane
    across: Axis
    others: Sequence[Axis]
    panels: Sequence[Panel]
    lines: Sequence[_Line]
    of: str
    quantity: Quantity

    @property
    def columns(self) -> int:
        """Panels in a row."""
        return panels_in_a_row(len(self.panels), self.others, 3)

    @property
    def size(self) -> tuple[float, float]:
        """Width and height in inches."""
        if len(self.panels) == 1:
            # Room for the names of the lines beside the panel.
            return COLUMN_WIDTH + 0.6, max(2.3, 0.35 + 0.17 * len(self.lines))
        return PAGE_WIDTH, 0.6 + 1.75 * math.ceil(len(self.panels) / self.columns)

    def __call__(self, canvas: Canvas) -> None:
        rows = math.ceil(len(self.panels) / self.columns)
        grid = canvas.subplots(rows, self.columns, squeeze=False, sharex=True, sharey=True)
        every = list(grid.flat)
        for spare in every[len(self.panels) :]:
            spare.remove()
        for at, (axes, panel) in enumerate(zip(every, self.panels, strict=False)):
            for line in self.lines:
                self._draw(axes, panel, line)
            axes.tick_params(labelbottom=at + self.columns >= len(self.panels))
            if panel.title:
                axes.set_title(plain_text(panel.title), fontsize=8, color=INK, pad=4)
        shown = every[: len(self.panels)]
        for axes in shown:
            self._finish(axes)
        if len(shown) == 1:
            shown[0].set_xlabel(plain_text(self.across.key))
            shown[0].set_ylabel(in_mathtext(self.quantity.axis))
        else:
            canvas.supxlabel(plain_text(self.across.key), fontsize=9, color=INK)
            canvas.supylabel(in_mathtext(self.quantity.axis), fontsize=9, color=INK)
        self._name_lines(canvas)

    def _name_lines(self, canvas: Canvas) -> None:
        """The legend: beside one panel, the uppermost line first; above several."""
        from matplotlib.lines import Line2D

        is_beside = len(self.panels) == 1
        handles = [
            Line2D(
                [],
                [],
                color=line.colour,
                linestyle=line.dash,
                marker=line.shape,
                markersize=3.2,
                label=plain_text(line.label),
            )
            for line in self.lines
        ]
        longest = max(len(line.label) for line in self.lines)
        canvas.legend(
            handles=handles[::-1] if is_beside else handles,
            title=plain_text(self.of) or None,
            title_fontsize=8,
            loc="outside right upper" if is_beside else "outside upper center",
            # Seven inches take about 140 characters.
            ncols=1 if is_beside else max(min(140 // (longest + 9), len(handles)), 1),
            frameon=False,
            handlelength=2.6,
            alignment="left" if is_beside else "center",
        )

    def _draw(self, axes: Axes, panel: Panel, line: _Line) -> None:
        found = [(self._place(n), line.rows[n]) for n in panel.points if n in line.rows]
        found.sort(key=lambda pair: pair[0])
        known = [(x, row) for x, row in found if self._is_drawable(row["mean"])]
        x = [place for place, _ in known]
        means, low, high = ([row[end] for _, row in known] for end in ("mean", "low", "high"))
        axes.fill_between(x, low, high, color=line.colour, alpha=0.16, linewidth=0)
        axes.plot(
            x, means, color=line.colour, linestyle=line.dash, marker=line.shape, markersize=3.2,
            linewidth=1.2, markeredgewidth=0.0,
        )  # fmt: skip
        lost = [place for place, row in found if row["diverged"]]
        (crosses,) = axes.plot(
            lost, [1.0] * len(lost), "x", transform=axes.get_xaxis_transform(), color=line.colour,
            markersize=4.5, markeredgewidth=1.1, clip_on=False, linestyle="none",
        )  # fmt: skip
        # An unclipped line without points would take all the room.
        crosses.set_in_layout(False)

    def _place(self, number: int) -> float:
        return self.across.number(self.plane.sweep.points[number])

    def _is_drawable(self, value: float) -> bool:
        return math.isfinite(value) and (value > 0 or not self.quantity.logarithmic)

    def _finish(self, axes: Axes) -> None:
        axis = self.across
        if self.quantity.logarithmic:
            axes.set_yscale("log")
            plain_log_ticks(axes)
        if self.quantity.line is not None:
            mark_value(axes, self.quantity.line)
        if self.quantity.limits is not None:
            axes.set_ylim(self.quantity.limits)
        if axis.logarithmic:
            axes.set_xscale("log")
        if len(axis.values) <= _MOST_TICKS or not axis.numerical:
            places = axis.values if axis.numerical else range(len(axis.values))
            axes.set_xticks(list(places), [plain_text(label) for label in axis.labels])  # type: ignore[arg-type]
            axes.tick_params(axis="x", which="minor", bottom=False)
        elif axis.logarithmic:
            plain_log_ticks(axes, horizontal=True)


def draw_by_setting(
    table: SweepTable, plane: Plane, statistic: str, branch: str, files: SavedFigure
) -> SavedFigure:
    """Draw a statistic of a branch against the horizontal axis, a line a value of the other one.

    Raises:
        NotDrawableError: there is no second axis, the points are not on a grid, nothing is
            measured, or there are too many panels.
    """
    from matplotlib import colormaps

    across, lines_of = plane.horizontal, plane.vertical
    if across is None or lines_of is None:
        raise NotDrawableError("fewer than two settings differ between points")
    data = statistic_of_points(table, statistic, branch)
    rows = {row["point"]: row for row in data.to_dict("records")}
    shades = colormaps["plasma"]
    count = len(lines_of.values)
    lines = [
        _Line(
            label,
            {n: row for n, row in rows.items() if lines_of.rank(plane.sweep.points[n]) == rank},
            shades(0.85 * rank / max(count - 1, 1)),
            shape=_SHAPES[rank % len(_SHAPES)],
        )
        for rank, label in enumerate(lines_of.labels)
    ]
    drawn = _Curves(
        plane, across, plane.others, plane.panels, lines, lines_of.key, quantities[statistic]
    )
    return _save(drawn, files, data)


def draw_by_branch(
    table: SweepTable, plane: Plane, statistic: str, files: SavedFigure
) -> SavedFigure:
    """Draw a statistic against the horizontal axis, a line a branch; other settings are panels.

    Raises:
        NotDrawableError: no setting differs, the points are not on a grid,
            nothing is measured, or there are too many panels.
    """
    import pandas as pd

    branches = [branch for branch in table.branches if branch != TRUNK]
    if plane.horizontal is None:
        raise NotDrawableError("no setting differs between points")
    data = {branch: statistic_of_points(table, statistic, branch) for branch in branches}
    data = {branch: rows for branch, rows in data.items() if rows["mean"].notna().any()}
    styles = branch_styles(data, DEFAULT_ROLES)
    lines = [
        _Line(
            styles[branch].label,
            {row["point"]: row for row in rows.to_dict("records")},
            styles[branch].colour,
            (0, styles[branch].dash) if styles[branch].dash else "solid",
            _SHAPES[rank % len(_SHAPES)],
        )
        for rank, (branch, rows) in enumerate(data.items())
    ]
    others = (plane.vertical, *plane.others) if plane.vertical else plane.others
    panels = panels_of(plane.sweep, others)
    drawn = _Curves(plane, plane.horizontal, others, panels, lines, "", quantities[statistic])
    if not data:
        raise NotDrawableError(f"no run that is done has measured {statistic}")
    return _save(drawn, files, pd.concat(data.values(), ignore_index=True))


def _save(drawn: _Curves, files: SavedFigure, data: pd.DataFrame) -> SavedFigure:
    if not drawn.plane.is_grid:
        raise NotDrawableError("the points are not on a grid")
    if data["mean"].isna().all():
        raise NotDrawableError("no run that is done has measured it")
    if len(drawn.panels) > MOST_PANELS:
        raise NotDrawableError(
            f"{len(drawn.panels)} combinations of the settings that are no axis, at most"
            f" {MOST_PANELS} panels: choose other axes"
        )
    return save_drawing(files, drawn.size, drawn, data)
