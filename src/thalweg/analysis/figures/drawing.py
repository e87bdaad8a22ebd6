"""Drawing for a paper: type, axes, curves with bands, labels at the ends of lines.

Everything works on a matplotlib `Figure` of its own; pyplot and its global state are not used.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from thalweg.analysis.figures.branch_style import BranchStyle
from thalweg.analysis.figures.curves import Curve, StepAxis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

#: Widths of one column of a two-column paper and of both, in inches.
COLUMN_WIDTH, PAGE_WIDTH = 3.4, 7.0
INK, FAINT = "#222222", "#8a8a8a"
BAND = "Line: mean over seeds; band: lowest to highest seed."
LOG_BAND = "Line: geometric mean over seeds; band: lowest to highest seed."

#: Type 42 because journals refuse the Type 3 fonts that are matplotlib's default. The fonts are
#: those that matplotlib brings, so that a figure looks the same on every machine.
STYLE: Mapping[str, Any] = {
    "pdf.fonttype": 42,
    "ps.fonttype": 42,
    "font.family": "STIXGeneral",
    "mathtext.fontset": "stix",
    "font.size": 9.0,
    "axes.labelsize": 9.0,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "legend.fontsize": 8.0,
    "axes.linewidth": 0.6,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "ytick.minor.width": 0.4,
    "xtick.major.size": 3.0,
    "ytick.major.size": 3.0,
    "ytick.minor.size": 1.8,
    "hatch.linewidth": 0.5,
    "lines.solid_capstyle": "round",
    "lines.dash_capstyle": "butt",
    "savefig.dpi": 200,
}


@dataclass(frozen=True)
class Look:
    """What all panels of one study share; `roles` tells which branches belong together."""

    axis: StepAxis
    styles: Mapping[str, BranchStyle]
    roles: Mapping[str, str] = field(default_factory=dict)


_MATHTEXT = {"χₖ": r"$\chi_k$", "λ₁": r"$\lambda_1$", "λᵢ": r"$\lambda_i$", "Sₖ": "$S_k$"}


def in_mathtext(text: str) -> str:
    """The text with its symbols as mathtext: the font has no subscript letters."""
    for symbol, mathtext in _MATHTEXT.items():
        text = text.replace(symbol, mathtext)
    return text


def paper_style() -> AbstractContextManager[None]:
    """Context in which to draw and save; the user's own matplotlib settings are put back after."""
    import matplotlib.style

    return matplotlib.style.context(["default", dict(STYLE)])


def draw_curve(
    axes: Axes,
    line: Curve,
    style: BranchStyle,
    *,
    scale: float = 1.0,
    band: bool = True,
    opacity: float = 0.18,
) -> None:
    """Mean over seeds as a line, lowest to highest seed as a band; values times `scale`.

    opacity   of the band
    """
    dashes: Any = (0, style.dash) if style.dash else "solid"
    if band and len(line.of_seed) > 1:
        low, high = line.low * scale, line.high * scale
        axes.fill_between(line.steps, low, high, color=style.colour, alpha=opacity, linewidth=0)
    axes.plot(
        line.steps,
        line.center * scale,
        color=style.colour,
        linewidth=style.width,
        linestyle=dashes,
    )


def mark_branch_point(axes: Axes, axis: StepAxis, *, label: bool = True) -> None:
    """A thin vertical line where the branches begin."""
    step = axis.branch_point
    # Branches from the initial parameters begin at the axis itself.
    if step is None or step <= axes.dataLim.x0:
        return
    axes.axvline(step, color=FAINT, linewidth=0.6, linestyle=(0, (1.5, 1.5)), zorder=0)
    if label:
        axes.annotate(
            "branch point",
            (step, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=8,
            color="#6b6b6b",
        )


def finish_steps(axes: Axes, axis: StepAxis, *, label: bool = True, ticks: int = 5) -> None:
    """Title, limits and sparse round ticks of the horizontal axis."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.margins(x=0.0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=ticks, steps=[1, 2, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda step, _: f"{step:,.0f}".replace("-", "\N{MINUS SIGN}"))
    )
    if label:
        axes.set_xlabel(axis.label)


def mark_value(axes: Axes, value: float, text: str = "") -> None:
    """A thin horizontal line at a value that matters, with its name at the left."""
    axes.axhline(value, color=INK, linewidth=0.6, linestyle=(0, (5, 2)), zorder=0)
    if text:
        axes.annotate(
            text,
            (0.0, value),
            xycoords=("axes fraction", "data"),
            xytext=(3, 2),
            textcoords="offset points",
            fontsize=8,
            color="#555555",
        )


def plain_log_ticks(axes: Axes, *, horizontal: bool = False) -> None:
    """Ticks of a logarithmic axis written as plain numbers (0.1, not 10^-1), few enough to read.

    horizontal   the horizontal axis; otherwise the vertical one
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    axis = axes.xaxis if horizontal else axes.yaxis
    low, high = axes.get_xlim() if horizontal else axes.get_ylim()
    span = high / max(low, 1e-300)
    inside: Sequence[float] = (1.0, 2.0, 5.0) if span < 200 else (1.0,)
    if span < 4:
        inside = (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)
    axis.set_major_locator(LogLocator(base=10, subs=inside, numticks=12))
    axis.set_minor_locator(LogLocator(base=10, subs=tuple(range(1, 10)), numticks=50))
    if span < 2:
        # Too narrow for round multiples of a power of ten.
        axis.set_major_locator(MaxNLocator(4 if horizontal else 5, steps=[1, 2, 5, 10]))
        axis.set_minor_locator(LogLocator(base=10, subs=(), numticks=50))
    axis.set_minor_formatter(NullFormatter())
    exponents = span > 1e6
    axis.set_major_formatter(
        axis.get_major_formatter() if exponents else FuncFormatter(lambda y, _: f"{y:g}")
    )


#: What stands at the end of a line: text, height, colour.
EndLabel = tuple[str, float, str]


def label_ends(
    axes: Axes, labels: Iterable[EndLabel], gap_points: float = 9.5, size: float = 8.0
) -> None:
    """Write each (text, y, colour) at the right edge, moved apart where they would overlap.

    gap_points   least distance between two baselines, in points
    size         of the text, in points
    """
    label_all_ends([(axes, list(labels))], gap_points, size)


def label_all_ends(
    panels: Sequence[tuple[Axes, Sequence[EndLabel]]], gap_points: float = 9.5, size: float = 8.0
) -> None:
    """`label_ends` for all panels of one figure: its layout is found once, not once a panel."""
    if not any(labels for _, labels in panels):
        return
    # Runs the layout, so that heights on the page are those of the finished figure.
    canvas = panels[0][0].get_figure(root=True)
    assert canvas is not None, "axes belong to a figure"
    canvas.draw_without_rendering()
    for axes, labels in panels:
        _write_ends(axes, sorted(labels, key=lambda label: label[1]), gap_points, size)


def _write_ends(axes: Axes, entries: Sequence[EndLabel], gap_points: float, size: float) -> None:
    canvas = axes.get_figure(root=True)
    assert canvas is not None, "axes belong to a figure"
    to_pixels = axes.transData
    pixels_per_point = canvas.dpi / 72
    right = axes.get_xlim()[1]
    wanted = [float(to_pixels.transform((right, y))[1]) / pixels_per_point for _, y, _ in entries]
    bottom, top = (float(edge) / pixels_per_point for edge in axes.bbox.intervaly)
    apart = spread_apart([min(max(y, bottom + 3), top - 3) for y in wanted], gap_points)
    placed = kept_between(apart, bottom, top, gap_points)
    for (text, y, colour), at, place in zip(entries, wanted, placed, strict=True):
        axes.annotate(
            text,
            (right, y),
            xytext=(4, place - at),
            textcoords="offset points",
            ha="left",
            va="center",
            color=colour,
            fontsize=size,
            annotation_clip=False,
        )


def label_inside(axes: Axes, step: float, label: EndLabel) -> None:
    """Write a label at the end of a line that ends before the right edge: above, or beside it.

    Beside the end of a line that leaves at the top, as one that diverges does: the title is above.
    """
    text, height, colour = label
    part = axes.transAxes.inverted().transform(axes.transData.transform((step, height)))[1]
    at_top = part > 0.85
    axes.annotate(
        text,
        (step, height),
        xytext=(4, 0) if at_top else (0, 4),
        textcoords="offset points",
        ha="left" if at_top else "right",
        va="top" if at_top else "baseline",
        color=colour,
        fontsize=7,
    )


def kept_between(positions: Sequence[float], low: float, high: float, gap: float) -> list[float]:
    """Sorted positions that are `gap` apart, moved into [low, high] as far as there is room."""
    last = len(positions) - 1
    lifted = [max(position, low + at * gap) for at, position in enumerate(positions)]
    return [min(position, high - (last - at) * gap) for at, position in enumerate(lifted)]


def name_lines(canvas: Canvas, lines: Sequence[tuple[str, str, tuple[float, ...]]]) -> None:
    """A legend of (text, colour, dash) above the panels of a figure."""
    from matplotlib.lines import Line2D

    canvas.legend(
        handles=[
            Line2D([], [], color=colour, linestyle=(0, dash) if dash else "solid", label=text)
            for text, colour, dash in lines
        ],
        loc="outside upper center",
        ncols=len(lines),
        frameon=False,
        handlelength=2.4,
    )


def spread_apart(positions: Sequence[float], gap: float) -> list[float]:
    """Nearest positions (least squares) to sorted ones that are at least `gap` apart.

    Isotonic regression by pooling neighbours, on the positions less their index times the gap.
    """
    pools: list[tuple[float, int]] = []
    for index, position in enumerate(positions):
        total, count = position - index * gap, 1
        while pools and pools[-1][0] / pools[-1][1] > total / count:
            before, size = pools.pop()
            total, count = total + before, count + size
        pools.append((total, count))
    means = [total / count for total, count in pools for _ in range(count)]
    return [mean + index * gap for index, mean in enumerate(means)]
