"""Figures of catalogued quantities along the steps: of all branches, or of the unsplit run.

Up to `MOST_TOGETHER` branches share a panel, each named at the end of its line. More are drawn as
small panels over both columns of a paper, one for each optimizer (or each variant of one), where
the same kind of branch has the same look in every panel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

from thalweg.analysis.figures import drawing
from thalweg.analysis.figures.branch_style import BranchStyle, group_label, group_styles
from thalweg.analysis.figures.curves import Curve, series_of
from thalweg.analysis.figures.drawing import EndLabel, Look
from thalweg.analysis.figures.families import MOST_TOGETHER, Group, in_groups
from thalweg.analysis.figures.figure import Curves, Figure, Source
from thalweg.analysis.quantities import Quantity, quantities

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

    from thalweg.analysis.figures.figure import Size

_PANELS_A_ROW = 3
#: A line is named at the right edge if it ends within this part of the axis before it.
_NEAR_THE_END = 0.05
#: So many lines that end earlier are named where they end; more would write over each other.
_MOST_INSIDE = 2


@dataclass(frozen=True)
class Line:
    """A quantity along the unsplit run, and how its line looks."""

    quantity: str
    colour: str
    dash: tuple[float, ...] = ()
    width: float = 1.3


@dataclass(frozen=True)
class _Options:
    """What a figure of branches asks for; see `figure_of_branches`."""

    beside: str
    late: bool
    share_y: bool
    linear: bool
    highest: float | None


@dataclass(frozen=True)
class _Cell:
    """One panel: a quantity of some branches."""

    axes: Axes
    quantity: Quantity
    styles: Mapping[str, BranchStyle]
    title: str = ""


def figure_of_branches(
    name: str,
    title: str,
    caption: str,
    *shown: str | Quantity,
    beside: str = "",
    late: bool = False,
    share_y: bool = False,
    linear: bool = False,
    highest: float | None = None,
    height: float = 2.3,
) -> Figure[Curve]:
    """The figure of quantities, by name those of the catalogue, along each branch.

    Several are drawn one below the other.

    beside    a quantity drawn faintly behind them, such as the learning rate set; outliers beyond
              their central values then do not stretch the axis
    late      leave out the early trunk, which would flatten all that follows
    share_y   one vertical axis for the panels of one quantity (of all, where there are few
              branches)
    linear    a linear axis for a quantity that is shown on a logarithmic one elsewhere
    highest   the axis begins at zero, and what is above this value is cut off
    height    in inches, for few branches
    """
    drawn = [quantities[q] if isinstance(q, str) else q for q in shown]
    options = _Options(beside, late, share_y, linear, highest)

    def curves(source: Source) -> Curves:
        wanted = [*drawn, quantities[beside]] if beside else drawn
        return {key: line for q in wanted for key, line in source.each_branch(q).items()}

    def draw(canvas: Canvas, curves: Curves, look: Look) -> None:
        _draw_each_branch(canvas, curves, look, drawn, options)

    needs = (*([beside] if beside else []), *(name for q in drawn for name in q.needs))
    return Figure(name, title, caption, needs, curves, draw, _size_of_branches(len(shown), height))


def figure_of_run(
    name: str,
    title: str,
    caption: str,
    *lines: Line,
    axis: str,
    points: bool = False,
    needs: tuple[str, ...] = (),
) -> Figure[Curve]:
    """The figure of several catalogued quantities along the unsplit run, on the first one's scale.

    axis     its title
    points   the measured steps are marked
    needs    columns without which there is no figure; by default those of all lines
    """
    first = quantities[lines[0].quantity]

    def curves(source: Source) -> Curves:
        return {
            f"{line.quantity}|{branch}": source.curve(
                branch, series_of(quantities[line.quantity]), logarithmic=first.logarithmic
            )
            for line in lines
            if {*quantities[line.quantity].needs} <= {*source.data.columns}
            for branch in source.plain_and_trunk()
        }

    def draw(canvas: Canvas, curves: Curves, look: Look) -> None:
        axes = canvas.subplots()
        if first.logarithmic:
            axes.set_yscale("log")
        ends: list[EndLabel] = []
        for line in lines:
            text, colour = quantities[line.quantity].short, line.colour
            style = BranchStyle(text, colour, colour, line.dash, line.width)
            of_run = [
                curve
                for key, curve in curves.items()
                if curve is not None and key.partition("|")[0] == line.quantity
            ]
            for curve in of_run:
                drawing.draw_curve(axes, curve, style)
                if points:
                    axes.plot(curve.steps, curve.center, ".", color=colour, markersize=3.6)
            if of_run:
                last = max(of_run, key=lambda curve: curve.steps[-1])
                ends.append((text, float(last.center[-1]), colour))
        if first.limits is not None:
            axes.set_ylim(*first.limits)
        axes.set_ylabel(drawing.in_mathtext(axis))
        drawing.mark_branch_point(axes, look.axis)
        drawing.finish_steps(axes, look.axis)
        if first.logarithmic:
            drawing.plain_log_ticks(axes)
        drawing.label_ends(axes, ends)

    every = tuple(name for line in lines for name in quantities[line.quantity].needs)
    return Figure(name, title, caption, needs or every, curves, draw)


def _draw_each_branch(
    canvas: Canvas, curves: Curves, look: Look, drawn: Sequence[Quantity], options: _Options
) -> None:
    """Draw quantities one below the other, or in many panels where there are many branches."""
    shown = _from_late_trunk(curves, look) if options.late else curves
    groups = _groups(curves, look)
    if groups is None:
        panels = canvas.subplots(len(drawn), 1, sharex=True, sharey=options.share_y, squeeze=False)
        cells = [
            _Cell(axes, quantity, look.styles)
            for axes, quantity in zip(panels[:, 0], drawn, strict=True)
        ]
        size, gap = 8.0, 9.5
    else:
        cells = _cells_of_groups(canvas, groups, look, drawn, share_y=options.share_y)
        size, gap = 7.0, 7.6
    labels = [(cell.axes, _draw_cell(cell, shown, look, options)) for cell in cells]
    _finish(canvas, cells, look, several=groups is not None)
    drawing.label_all_ends(labels, gap, size)


def _size_of_branches(quantities: int, height: float) -> Callable[[Curves, Look], Size]:
    """Width and height of such a figure; `height` is that for few branches."""

    def size(curves: Curves, look: Look) -> Size:
        groups = _groups(curves, look)
        if groups is None:
            return drawing.COLUMN_WIDTH, height
        rows = ceil(len(groups) / _PANELS_A_ROW) if quantities == 1 else len(groups)
        return drawing.PAGE_WIDTH, 0.35 + 1.45 * rows

    return size


def _groups(curves: Curves, look: Look) -> list[Group] | None:
    """The groups to draw in a panel each; None where all fit in one panel."""
    drawn = {line.branch for line in curves.values() if line is not None} - {"trunk"}
    if len(drawn) <= MOST_TOGETHER:
        return None
    # Grouped as the whole study is, so that a branch is in the same company in every figure.
    groups = in_groups(list(look.styles), look.roles)
    kept = [
        Group(group.head, group.tail, tuple(name for name in group.members if name in drawn))
        for group in groups
    ]
    several = [group for group in kept if set(group.members) - {group.head} or not group.tail]
    # One small panel beside empty places would show less than one for all.
    return several if len(several) > 1 else None


def _cells_of_groups(
    canvas: Canvas,
    groups: Sequence[Group],
    look: Look,
    drawn: Sequence[Quantity],
    *,
    share_y: bool,
) -> list[_Cell]:
    several = len(drawn) > 1
    columns = len(drawn) if several else _PANELS_A_ROW
    rows = len(groups) if several else ceil(len(groups) / columns)
    sharing = ("row" if several else "all") if share_y else "none"
    grid = canvas.subplots(rows, columns, sharex=True, sharey=sharing, squeeze=False)
    cells = []
    for index, group in enumerate(groups):
        # The trunk's style stays; a group's own styles name no trunk.
        styles = dict(look.styles) | group_styles(group, look.roles)
        members = {name: styles[name] for name in ("trunk", *group.members) if name in styles}
        places = grid[index] if several else [grid.flat[index]]
        cells += [
            _Cell(axes, quantity, members, group_label(group))
            for axes, quantity in zip(places, drawn, strict=True)
        ]
    for axes in grid.flat[len(cells) :]:
        axes.remove()
    return cells


def _draw_cell(cell: _Cell, curves: Curves, look: Look, options: _Options) -> list[EndLabel]:
    """Draw one panel; returns the labels for the ends of the lines."""
    axes, quantity = cell.axes, cell.quantity
    if quantity.logarithmic and not options.linear:
        axes.set_yscale("log")
    labels: list[EndLabel] = []
    ends_early: list[tuple[float, EndLabel]] = []
    inside: Curves = {
        name: line for name, line in curves.items() if line and line.branch in cell.styles
    }
    steps = [step for line in inside.values() if line for step in line.steps[[0, -1]]]
    first, last = min(steps, default=0.0), max(steps, default=0.0)
    for name, line in inside.items():
        kind = name.partition("|")[0]
        if line is None or kind not in (quantity.name, options.beside):
            continue
        if kind == options.beside:
            axes.plot(line.steps, line.center, color=drawing.FAINT, linewidth=0.7, zorder=0)
            continue
        style = cell.styles[line.branch]
        # Several bands in a small panel would hide the lines.
        opacity = 0.1 if cell.title else 0.18
        drawing.draw_curve(axes, line, style, scale=quantity.factor, opacity=opacity)
        if line.branch != "trunk":
            end = (style.label, float(line.center[-1]) * quantity.factor, style.colour)
            if line.steps[-1] > last - _NEAR_THE_END * (last - first):
                labels.append(end)
            else:
                ends_early.append((float(line.steps[-1]), end))
    if len(ends_early) > _MOST_INSIDE:
        labels += [end for _, end in ends_early]
    else:
        for step, end in ends_early:
            drawing.label_inside(axes, step, end)
    if quantity.line is not None:
        drawing.mark_value(axes, quantity.line)
    if options.highest is not None:
        most = max((float(line.high.max()) for line in curves.values() if line), default=0.0)
        axes.set_ylim(0.0, 1.05 * max(quantity.line or 0.0, min(options.highest, most)))
    elif quantity.limits is not None:
        axes.set_ylim(*quantity.limits)
    elif options.beside:
        axes.set_ylim(*_central_range(inside, options.beside))
    drawing.mark_branch_point(axes, look.axis, label=not cell.title and _is_top(axes))
    return labels


def _finish(canvas: Canvas, cells: Sequence[_Cell], look: Look, *, several: bool) -> None:
    """Titles, ticks and what stands once for several panels."""
    stacked = len({cell.quantity.name for cell in cells}) > 1
    for cell in cells:
        axes = cell.axes
        first = not several or _is_left(axes) or stacked
        if cell.title:
            axes.set_title(cell.title, fontsize=8, loc="left", pad=2)
        if first:
            # Of several quantities each has little height.
            label = cell.quantity.axis.replace(", ", ",\n") if stacked else cell.quantity.axis
            axes.set_ylabel(drawing.in_mathtext(label), fontsize=8 if several else 9)
        # A panel above an empty place is the last of its column.
        last = not any(_is_below(other.axes, axes) for other in cells)
        axes.tick_params(labelbottom=last)
        drawing.finish_steps(axes, look.axis, label=last and not several)
        if axes.get_yscale() == "log":
            drawing.plain_log_ticks(axes)
    if several:
        canvas.supxlabel(look.axis.label, fontsize=9)


def _is_top(axes: Axes) -> bool:
    place = axes.get_subplotspec()
    return place is None or place.is_first_row()


def _is_left(axes: Axes) -> bool:
    place = axes.get_subplotspec()
    return place is None or place.is_first_col()


def _is_below(lower: Axes, upper: Axes) -> bool:
    low, high = lower.get_subplotspec(), upper.get_subplotspec()
    if low is None or high is None:
        return False
    return low.colspan.start == high.colspan.start and low.rowspan.start > high.rowspan.start


def _from_late_trunk(curves: Curves, look: Look) -> Curves:
    """The curves less the early trunk: two thirds of it stay, or half a branch's length if shorter.

    Early training changes so much more than a branch that it would flatten all that follows.
    """
    point = look.axis.branch_point
    ends = [line.steps[-1] for line in curves.values() if line and line.branch != "trunk"]
    if point is None or not ends:
        return curves
    trunk = [line.steps[0] for line in curves.values() if line and line.branch == "trunk"]
    first = min(trunk, default=point)
    start = max(point - (max(ends) - point) / 2, first + (point - first) / 3)
    return {name: line and line.since(start) for name, line in curves.items()}


def _central_range(curves: Curves, beside: str) -> tuple[float, float]:
    """Limits that hold the lines, and half to one and a half times what is drawn beside them.

    Small noise must not look large; nor may an outlier, further from the central 98 % than these
    are wide, flatten all others.
    """
    import numpy as np

    values = np.concatenate([line.center for line in curves.values() if line is not None])
    rates = [line.center for name, line in curves.items() if line and name.startswith(beside)]
    around = np.concatenate([rate * factor for rate in rates for factor in (0.5, 1.5)])
    low, high = np.nanpercentile(values, [1, 99])
    near = values[(values > 2 * low - high) & (values < 2 * high - low)]
    shown = np.concatenate([near, around])
    margin = 0.03 * float(shown.max() - shown.min())
    return float(shown.min()) - margin, float(shown.max()) + margin
