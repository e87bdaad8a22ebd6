"""Figure of the alignment of the update in two metrics: Euclidean, and the optimizer's own."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING

from thalweg.analysis.figures import drawing
from thalweg.analysis.figures.curves import branches_of, series_of
from thalweg.analysis.figures.drawing import BAND, Look
from thalweg.analysis.figures.families import unsplit
from thalweg.analysis.figures.figure import Curves, Figure, Size, Source
from thalweg.analysis.quantities import quantities
from thalweg.registry import figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

_OWN, _EUCLIDEAN = quantities["alignment_proposed_own_metric"], quantities["alignment_proposed"]
#: Of more branches only the unsplit ones are drawn.
_MOST_METRIC_PANELS = 9


def _metric_curves(source: Source) -> Curves:
    branches = branches_of(source.data, source.roles)
    own = {branch: source.curve(branch, series_of(_OWN)) for branch in branches}
    # The Euclidean one is everywhere: alone it says nothing about the metric.
    measured = [branch for branch, line in own.items() if line is not None]
    if len(measured) > _MOST_METRIC_PANELS:
        measured = unsplit(measured, source.roles) or measured
    return {
        f"{quantity.name}|{branch}": line
        for branch in measured
        for quantity, line in (
            (_EUCLIDEAN, source.curve(branch, series_of(_EUCLIDEAN))),
            (_OWN, own[branch]),
        )
    }


def _metric_branches(curves: Curves) -> list[str]:
    return list(dict.fromkeys(line.branch for line in curves.values() if line is not None))


def _metric_grid(curves: Curves) -> tuple[int, int]:
    """Rows and columns of panels."""
    count = len(_metric_branches(curves))
    columns = 1 if count == 1 else 2 if count <= 4 else 3
    return ceil(count / columns), columns


def _metric_size(curves: Curves, look: Look) -> Size:
    rows, columns = _metric_grid(curves)
    width = drawing.PAGE_WIDTH if columns == 3 else drawing.COLUMN_WIDTH
    return width, 0.75 + (1.5 if columns == 1 else 1.2) * rows


def _draw_metrics(canvas: Canvas, curves: Curves, look: Look) -> None:
    rows, columns = _metric_grid(curves)
    panels = canvas.subplots(rows, columns, sharex=False, sharey=True, squeeze=False)
    kinds = (
        (_EUCLIDEAN, "Euclidean metric", "#0072b2", ()),
        (_OWN, "optimizer's own metric", "#d55e00", (4.0, 1.5)),
    )
    limits = _OWN.limits or (0.0, 1.0)
    for axes, branch in zip(panels.flat, _metric_branches(curves), strict=False):
        for quantity, text, colour, dash in kinds:
            line = curves.get(f"{quantity.name}|{branch}")
            if line is not None:
                drawing.draw_curve(axes, line, drawing.BranchStyle(text, colour, colour, dash))
        axes.set_title(look.styles[branch].label, fontsize=8, loc="left", pad=2)
        axes.set_ylim(*limits)
        drawing.finish_steps(axes, look.axis, label=False, ticks=3 if columns > 1 else 5)
    for axes in panels.flat[len(_metric_branches(curves)) :]:
        axes.remove()
    canvas.supxlabel(look.axis.label, fontsize=9)
    canvas.supylabel(drawing.in_mathtext("alignment χₖ"), fontsize=9)
    drawing.name_lines(canvas, [(text, colour, dash) for _, text, colour, dash in kinds])


figures.add_named(
    Figure(
        name="own-metric",
        title="Alignment of the update in the optimizer's own metric",
        caption="chi_k of the update proposed in the Euclidean metric, and in the metric of the "
        f"optimizer's preconditioner; of more than {_MOST_METRIC_PANELS} branches only the unsplit "
        f"ones. Running mean over {_OWN.window:.0%} of a run. " + BAND,
        needs=(_EUCLIDEAN.name, _OWN.name),
        curves=_metric_curves,
        draw=_draw_metrics,
        size=_metric_size,
    )
)
