"""Phase diagrams: two settings as axes, each point's value or verdict as the colour of its cell.

Equal steps on the axes are neighbouring values, whatever they are: numbers that are spaced by
factors look even. A third setting, and all further ones, give small multiples. Points that are not
on a grid, as from a random search, are dots at their numbers instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from thalweg.analysis.claims.statistics import rows_where
from thalweg.analysis.claims.verdicts import SYMBOLS, number
from thalweg.analysis.figures.drawing import (
    COLUMN_WIDTH,
    INK,
    PAGE_WIDTH,
    in_mathtext,
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
    plain_text,
    statistic_of_points,
)
from thalweg.analysis.regimes.table import SweepTable

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

_HATCH, _HATCH_INK = "/////", "#6b6b6b"
_GREY = "#dcdcdc"
_COLOURS = "viridis"
#: Fill and ink of each outcome; the symbols tell them apart without the colours.
_OUTCOMES: Mapping[str, tuple[str, str]] = {
    "holds": ("#009e73", "#ffffff"),
    "does not hold": ("#d55e00", "#ffffff"),
    "undecided": ("#f4e6bd", INK),
}


@dataclass(frozen=True)
class Mark:
    """How one point looks.

    Attributes:
        fill: colour; empty: grey, for a point that has no value.
        hatched: whether lines cross it.
        outcome: whose symbol it has; empty: none.
        text: the value, written into the cell where there is room.
        ink: colour of symbol and text.
        said: what a page says where the mouse is, after the settings.
    """

    fill: str = ""
    hatched: bool = False
    outcome: str = ""
    text: str = ""
    ink: str = INK
    said: str = ""


@dataclass(frozen=True)
class Region:
    """Where a point is in the picture: left, top, width and height as parts of it."""

    point: int
    box: tuple[float, ...]
    said: str


@dataclass(frozen=True)
class Picture:
    """A figure's files, and where its points are, for links; none where points share a place."""

    saved: SavedFigure
    regions: Sequence[Region] = ()


@dataclass
class _Drawing:
    """A phase diagram being drawn; `key` draws the scale or the legend beside it."""

    plane: Plane
    marks: Sequence[Mark | None]
    key: Callable[[Canvas, Sequence[Axes]], None]
    axes: list[Axes] = field(default_factory=list)

    @property
    def across(self) -> int:
        """Panels in a row."""
        most = 3 if _columns(self.plane) > 6 or not self.plane.is_grid else 4
        return panels_in_a_row(len(self.plane.panels), self.plane.others, most)

    @property
    def size(self) -> tuple[float, float]:
        """Width and height in inches."""
        panels, columns = len(self.plane.panels), _columns(self.plane)
        wide = panels > 1 or columns > 10
        width = PAGE_WIDTH if wide else COLUMN_WIDTH
        down = math.ceil(panels / self.across)
        return width, 0.75 + down * (self.panel_height + (0.3 if panels > 1 else 0.0))

    @property
    def panel_height(self) -> float:
        """Inches of one panel without what is written around it."""
        if not self.plane.is_grid:
            return 2.2 if len(self.plane.panels) == 1 else 1.7
        rows = len(self.plane.vertical.values) if self.plane.vertical else 1
        return min(max(0.27 * rows, 0.4), 5.0)

    def __call__(self, canvas: Canvas) -> None:
        panels = self.plane.panels
        down = math.ceil(len(panels) / self.across)
        grid = canvas.subplots(down, self.across, squeeze=False, sharex=True, sharey=True)
        self.axes = list(grid.flat)[: len(panels)]
        for spare in list(grid.flat)[len(panels) :]:
            spare.remove()
        for at, (axes, panel) in enumerate(zip(self.axes, panels, strict=True)):
            draw = self._cells if self.plane.is_grid else self._dots
            draw(axes, panel)
            last = at + self.across >= len(panels)
            axes.tick_params(labelbottom=last, labelleft=at % self.across == 0)
            if panel.title:
                axes.set_title(plain_text(panel.title), fontsize=8, color=INK, pad=4)
        _name_axes(canvas, self.axes, self.plane, self.across)
        self.key(canvas, self.axes)

    def _cells(self, axes: Axes, panel: Panel) -> None:
        from matplotlib.collections import PatchCollection
        from matplotlib.patches import Rectangle

        marked = [(self.plane.cell(n), mark) for n in panel.points if (mark := self.marks[n])]
        squares = [Rectangle((x - 0.5, y - 0.5), 1, 1) for (x, y), _ in marked]
        fills = [mark.fill or _GREY for _, mark in marked]
        axes.add_collection(
            PatchCollection(squares, facecolors=fills, edgecolors="white", linewidths=0.8)
        )
        hatched = [s for s, (_, mark) in zip(squares, marked, strict=True) if mark.hatched]
        axes.add_collection(
            PatchCollection(
                hatched, facecolors="none", edgecolors=_HATCH_INK, hatch=_HATCH, linewidths=0
            )
        )
        _draw_symbols(axes, marked, self._symbol_size)
        for (x, y), mark in marked:
            if mark.text and self._has_room:
                axes.text(x, y, mark.text, color=mark.ink, ha="center", va="center", fontsize=6.5)
        _rank_axis(axes, self.plane.horizontal, self._cell_width, horizontal=True)
        _rank_axis(axes, self.plane.vertical, self.panel_height / max(_rows(self.plane), 1))
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)

    @property
    def _cell_width(self) -> float:
        """Inches, about."""
        return (self.size[0] - 1.1) / self.across / _columns(self.plane)

    @property
    def _has_room(self) -> bool:
        return self._cell_width >= 0.34 and self.panel_height / _rows(self.plane) >= 0.15

    @property
    def _symbol_size(self) -> float:
        """Points."""
        cell = min(self._cell_width, self.panel_height / _rows(self.plane))
        return min(max(72 * 0.42 * cell, 1.2), 7.0)

    def _dots(self, axes: Axes, panel: Panel) -> None:
        across, up = self.plane.horizontal, self.plane.vertical
        assert across is not None, "a scatter has two axes"
        assert up is not None, "a scatter has two axes"
        points = self.plane.sweep.points
        marked = [
            ((across.number(points[n]), up.number(points[n])), mark)
            for n in panel.points
            if (mark := self.marks[n])
        ]
        for hatch in (False, True):
            own = [(place, mark) for place, mark in marked if mark.hatched == hatch]
            axes.scatter(
                [x for (x, _), _ in own],
                [y for (_, y), _ in own],
                c=[mark.fill or _GREY for _, mark in own],
                hatch=_HATCH if hatch else None,
                s=44,
                linewidths=0.5,
                edgecolors=_HATCH_INK,
            )
        _draw_symbols(axes, marked, 4.0)
        for axis, horizontal in ((across, True), (up, False)):
            _number_axis(axes, axis, horizontal=horizontal)

    def regions(self) -> list[Region]:
        """Where each point is, once the picture has been drawn."""
        found: list[Region] = []
        for axes, panel in zip(self.axes, self.plane.panels, strict=True):
            canvas = axes.get_figure(root=True)
            assert canvas is not None, "axes belong to a figure"
            width, height = canvas.bbox.width, canvas.bbox.height
            for number_ in panel.points:
                mark = self.marks[number_]
                if mark is None:
                    continue
                (left, bottom), (right, top) = self._corners(axes, number_)
                place = (left / width, 1 - top / height)
                size = ((right - left) / width, (top - bottom) / height)
                found.append(Region(number_, (*map(float, place), *map(float, size)), mark.said))
        return found

    def _corners(self, axes: Axes, number_: int) -> Any:
        """Lower left and upper right corner of a point, in pixels."""
        if self.plane.is_grid:
            x, y = self.plane.cell(number_)
            return axes.transData.transform([(x - 0.5, y - 0.5), (x + 0.5, y + 0.5)])
        point, reach = self.plane.sweep.points[number_], axes.figure.dpi / 12
        assert self.plane.horizontal
        assert self.plane.vertical
        place = (self.plane.horizontal.number(point), self.plane.vertical.number(point))
        x, y = axes.transData.transform(place)
        return (x - reach, y - reach), (x + reach, y + reach)


def draw_statistic(
    table: SweepTable, plane: Plane, statistic: str, branch: str, files: SavedFigure
) -> Picture:
    """Draw the phase diagram of a statistic.

    Raises:
        NotDrawableError: no run of the branch that is done has measured it, or there are too many
            panels.
    """
    data = statistic_of_points(table, statistic, branch)
    quantity = quantities[statistic]
    known = data["mean"].dropna()
    if known.empty:
        raise NotDrawableError(f"no run of {branch} that is done has measured {statistic}")
    scale = _scale(known.tolist(), quantity)
    marks = [_value_mark(row, scale, quantity) for row in data.to_dict("records")]

    def key(canvas: Canvas, axes: Sequence[Axes]) -> None:
        bar = canvas.colorbar(scale, ax=axes, aspect=24, pad=0.02, fraction=0.05)
        bar.outline.set_visible(False)  # type: ignore[operator]
        bar.set_label(in_mathtext(quantity.axis))
        bar.ax.tick_params(length=2)
        if _is_logarithmic(scale):
            plain_log_ticks(bar.ax)

    return _saved(_Drawing(plane, marks, key), files, data)


def draw_claim(table: SweepTable, plane: Plane, label: str, files: SavedFigure) -> Picture:
    """Draw the phase diagram of a claim's verdicts.

    Raises:
        NotDrawableError: there are too many panels.
    """
    import pandas as pd

    own = rows_where(table.verdicts, "label", label)
    verdicts = {row["point"]: row for row in own.to_dict("records")}
    diverged = table.diverged
    points = range(len(table.sweep.points))
    marks = [_verdict_mark(verdicts.get(at), at in diverged) for at in points]
    shown = {"diverged" if not mark.outcome else mark.outcome for mark in marks if mark}

    def key(canvas: Canvas, axes: Sequence[Axes]) -> None:
        _legend(canvas, [name for name in (*SYMBOLS, "diverged") if name in shown])

    data = pd.DataFrame(
        [
            {"point": at, **table.settings(at), "label": label, **_numbers(verdicts.get(at))}
            for at in points
        ],
        columns=["point", *table.columns.values(), "label", "outcome", *_JUDGED],
    )
    data["diverged"] = [at in diverged for at in points]
    return _saved(_Drawing(plane, marks, key), files, data)


_JUDGED = ("mean", "low", "high", "seeds")


def _numbers(verdict: Mapping[str, Any] | None) -> dict[str, Any]:
    return {} if verdict is None else {name: verdict[name] for name in ("outcome", *_JUDGED)}


def _saved(drawing: _Drawing, files: SavedFigure, data: pd.DataFrame) -> Picture:
    count = len(drawing.plane.panels)
    if count > MOST_PANELS:
        raise NotDrawableError(
            f"{count} combinations of the settings that are no axis, at most {MOST_PANELS} panels:"
            " choose other axes"
        )
    saved = save_drawing(files, drawing.size, drawing, data)
    return Picture(saved, drawing.regions())


def _scale(values: Sequence[float], quantity: Quantity) -> Any:
    """Colours of values: logarithmic where they span a decade (two, for a linear quantity)."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm, Normalize

    low, high = min(values), max(values)
    decades = math.log10(high / low) if low > 0 else 0.0
    is_logarithmic = decades >= (1 if quantity.logarithmic else 2)
    if not high > low:
        low, high = low - (abs(low) or 1.0) / 10, high + (abs(high) or 1.0) / 10
    return ScalarMappable(LogNorm(low, high) if is_logarithmic else Normalize(low, high), _COLOURS)


def _is_logarithmic(scale: Any) -> bool:
    from matplotlib.colors import LogNorm

    return isinstance(scale.norm, LogNorm)


def _value_mark(row: Mapping[str, Any], scale: Any, quantity: Quantity) -> Mark | None:
    from matplotlib.colors import to_hex

    diverged = row["diverged"]
    of = f"{diverged} of {diverged + row['seeds'] + row['unfinished']} seeds diverged"
    if math.isnan(row["mean"]):
        return Mark(hatched=True, said=of) if diverged else None
    red, green, blue, _ = scale.to_rgba(row["mean"])
    is_light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.5
    value = number(row["mean"])
    seeds = f"{row['seeds']} seed" + ("" if row["seeds"] == 1 else "s")
    return Mark(
        to_hex((red, green, blue)),
        hatched=diverged > 0,
        text="" if diverged else value,
        ink=INK if is_light else "#ffffff",
        said=f"{quantity.short or quantity.label} {value} {quantity.unit}".strip()
        + f", {seeds}"
        + (f"; {of}" if diverged else ""),
    )


def _verdict_mark(verdict: Mapping[str, Any] | None, diverged: bool) -> Mark | None:
    if verdict is None:
        return Mark(hatched=True, said="not judged, a run diverged") if diverged else None
    outcome = verdict["outcome"]
    fill, ink = _OUTCOMES[outcome]
    said = outcome
    if not math.isnan(verdict["mean"]):
        said += f", {number(verdict['mean'])}"
        if not math.isnan(verdict["low"]):
            said += f" [{number(verdict['low'])}, {number(verdict['high'])}]"
    said += "; a run diverged" if diverged else ""
    return Mark(fill, outcome == "undecided", outcome, "", ink, said)


def _draw_symbols(
    axes: Axes, marked: Sequence[tuple[tuple[float, float], Mark]], size: float
) -> None:
    """The symbol of each outcome, all of one kind at once: a figure may have thousands."""
    for outcome, (fill, ink) in _OUTCOMES.items():
        places = [place for place, mark in marked if mark.outcome == outcome]
        if not places:
            continue
        x, y = zip(*places, strict=True)
        line: dict[str, Any] = {"linestyle": "none", "markersize": size, "color": ink}
        if outcome == "undecided":
            # On a disc of its own, for the hatching would cross it.
            disc = {**line, "markersize": 1.3 * size, "color": fill}
            axes.plot(x, y, marker="o", markeredgewidth=0, **disc)
            axes.plot(x, y, marker="$?$", markeredgewidth=0.2, **line)
        else:
            width = min(max(size / 4.5, 0.5), 1.4)
            shape: Any = _tick() if outcome == "holds" else "x"
            axes.plot(x, y, marker=shape, fillstyle="none", markeredgewidth=width, **line)


def _tick() -> Any:
    """A check mark: the fonts of the figures have none."""
    from matplotlib.path import Path

    return Path([(-0.5, 0.0), (-0.12, -0.4), (0.55, 0.5)], [Path.MOVETO, Path.LINETO, Path.LINETO])


def _legend(canvas: Canvas, names: Sequence[str]) -> None:
    """The kinds of cells that there are, above the panels, as they look."""
    from matplotlib.legend_handler import HandlerBase
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch, Rectangle

    symbols: Mapping[str, Any] = {"holds": _tick(), "does not hold": "x", "undecided": "$?$"}

    class Swatch(HandlerBase):
        """A cell with its symbol."""

        def create_artists(
            self,
            legend: Any,
            orig_handle: Any,
            xdescent: float,
            ydescent: float,
            width: float,
            height: float,
            fontsize: float,
            trans: Any,
        ) -> list[Any]:
            left, bottom, name = -xdescent, -ydescent, orig_handle.get_label()
            fill, ink = _OUTCOMES.get(name, (_GREY, INK))
            is_hatched = name not in ("holds", "does not hold")
            hatch = _HATCH if is_hatched else None
            cell = Rectangle(
                (left, bottom - 1), width, height + 2, facecolor=fill, edgecolor=_HATCH_INK,
                hatch=hatch, linewidth=0,
            )  # fmt: skip
            cell.set_transform(trans)
            if name not in symbols:
                return [cell]
            symbol = Line2D(
                [left + width / 2], [bottom + height / 2], marker=symbols[name],
                markersize=5, color=ink, linestyle="none", fillstyle="none",
                markeredgewidth=0.3 if is_hatched else 1.1,
            )  # fmt: skip
            symbol.set_transform(trans)
            return [cell, symbol]

    if names:
        canvas.legend(
            handles=[Patch(label=name) for name in names],
            handler_map={Patch: Swatch()},
            loc="outside upper center",
            ncols=len(names),
            frameon=False,
            handlelength=1.5,
            handletextpad=0.5,
            columnspacing=1.2,
        )


def _columns(plane: Plane) -> int:
    return len(plane.horizontal.values) if plane.horizontal and plane.is_grid else 1


def _rows(plane: Plane) -> int:
    return len(plane.vertical.values) if plane.vertical and plane.is_grid else 1


def _rank_axis(axes: Axes, axis: Axis | None, step: float, *, horizontal: bool = False) -> None:
    """Ticks at the values, as many as there is room for; `step`: inches between two of them."""
    along = axes.xaxis if horizontal else axes.yaxis
    limits = axes.set_xlim if horizontal else axes.set_ylim
    if axis is None:
        limits(-0.5, 0.5)
        along.set_visible(False)
        return
    count = len(axis.values)
    limits(-0.5, count - 0.5)
    longest = max(map(len, axis.labels))
    is_turned = horizontal and 0.058 * longest + 0.03 > step
    every = max(1, math.ceil((0.13 if is_turned or not horizontal else 0.0) / step))
    ranks = range(0, count, every)
    along.set_ticks(ranks, [plain_text(axis.labels[rank]) for rank in ranks])
    if is_turned:
        axes.tick_params(axis="x", labelrotation=90)


def _number_axis(axes: Axes, axis: Axis, *, horizontal: bool) -> None:
    """The numbers of an axis to scale, or its values one after another where they are none."""
    if not axis.numerical:
        _rank_axis(axes, axis, 0.3, horizontal=horizontal)
        return
    if axis.logarithmic:
        (axes.set_xscale if horizontal else axes.set_yscale)("log")
        plain_log_ticks(axes, horizontal=horizontal)


def _name_axes(canvas: Canvas, axes: Sequence[Axes], plane: Plane, across: int) -> None:
    """The names of the settings, once for all panels."""
    names = [plain_text(axis.key) if axis else "" for axis in (plane.horizontal, plane.vertical)]
    if len(axes) == 1:
        axes[0].set_xlabel(names[0])
        axes[0].set_ylabel(names[1])
    else:
        canvas.supxlabel(names[0], fontsize=9, color=INK)
        canvas.supylabel(names[1], fontsize=9, color=INK)
