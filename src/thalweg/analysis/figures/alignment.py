"""Figures of the alignment with the dominant subspace: which vector, which branch, which metric."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING

from thalweg.analysis.figures import drawing
from thalweg.analysis.figures.along_steps import Quantity, figure_of_branches
from thalweg.analysis.figures.curves import branches_of, column
from thalweg.analysis.figures.dot_drawing import DotRow, Mark, draw_rows, name_marks, size_of_rows
from thalweg.analysis.figures.dots import Dots
from thalweg.analysis.figures.drawing import BAND, Look
from thalweg.analysis.figures.families import unsplit
from thalweg.analysis.figures.saving import Curves, Figure, NotDrawableError, Size, Source
from thalweg.analysis.figures.windows import mean_since, seed_tables

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.figure import Figure as Canvas

#: Window of the running mean of alignments, as a part of a run.
WINDOW = 0.03
_AXIS_TITLE = r"alignment $\chi_k$"
_LIMITS = (0.0, 1.005)

# Three vectors along trunk and plain branch. Split branches would show 0 or 1 for the update by
# construction; their gradient has a figure of its own.
_VECTORS = (
    ("alignment_gradient", "full gradient", "#0072b2", ()),
    ("alignment_minibatch", "mini-batch gradient", "#e69f00", (4.0, 1.5)),
    ("alignment_update", "update", "#cc79a7", (1.2, 1.2)),
)


def _alignment_curves(source: Source) -> Curves:
    return {
        f"{name}|{branch}": source.curve(branch, column(name, WINDOW))
        for name, *_ in _VECTORS
        if name in source.data.columns
        for branch in source.plain_and_trunk()
    }


def _draw_alignment(canvas: Canvas, curves: Curves, look: Look) -> None:
    axes = canvas.subplots()
    labels: dict[str, drawing.EndLabel] = {}
    for name, text, colour, dash in _VECTORS:
        for key, line in curves.items():
            if line is not None and key.partition("|")[0] == name:
                drawing.draw_curve(axes, line, drawing.BranchStyle(text, colour, colour, dash))
                labels[name] = (text, float(line.center[-1]), colour)
    axes.set_ylim(*_LIMITS)
    axes.set_ylabel(_AXIS_TITLE)
    drawing.mark_branch_point(axes, look.axis)
    drawing.finish_steps(axes, look.axis)
    drawing.label_ends(axes, labels.values())


ALIGNMENT = Figure(
    name="alignment",
    title="Alignment with the dominant subspace",
    caption="chi_k, the part of a vector's length that lies in the dominant subspace, along "
    "the unsplit run: of the full gradient, of the mini-batch gradient, of the update. Running "
    f"mean over {WINDOW:.0%} of a run. " + BAND,
    needs=("alignment_gradient",),
    curves=_alignment_curves,
    draw=_draw_alignment,
)


ALIGNMENT_OF_BRANCHES = figure_of_branches(
    "alignment-of-branches",
    "Alignment of the full gradient, branch by branch",
    "chi_k of the gradient of the full training loss along each branch. Running mean over "
    f"{WINDOW:.0%} of a run. " + BAND,
    Quantity("alignment_gradient", _AXIS_TITLE, limits=_LIMITS),
    window=WINDOW,
    share_y=True,
)


_OWN, _EUCLIDEAN = "alignment_proposed_own_metric", "alignment_proposed"
#: Of more branches only the unsplit ones are drawn.
_MOST_METRIC_PANELS = 9


def _metric_curves(source: Source) -> Curves:
    branches = branches_of(source.data, source.roles)
    own = {branch: source.curve(branch, column(_OWN, WINDOW)) for branch in branches}
    # The Euclidean one is everywhere: alone it says nothing about the metric.
    measured = [branch for branch, line in own.items() if line is not None]
    if len(measured) > _MOST_METRIC_PANELS:
        measured = unsplit(measured, source.roles) or measured
    return {
        f"{name}|{branch}": line
        for branch in measured
        for name, line in (
            (_EUCLIDEAN, source.curve(branch, column(_EUCLIDEAN, WINDOW))),
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
    for axes, branch in zip(panels.flat, _metric_branches(curves), strict=False):
        for name, text, colour, dash in kinds:
            line = curves.get(f"{name}|{branch}")
            if line is not None:
                drawing.draw_curve(axes, line, drawing.BranchStyle(text, colour, colour, dash))
        axes.set_title(look.styles[branch].label, fontsize=8, loc="left", pad=2)
        axes.set_ylim(*_LIMITS)
        drawing.finish_steps(axes, look.axis, label=False, ticks=3 if columns > 1 else 5)
    for axes in panels.flat[len(_metric_branches(curves)) :]:
        axes.remove()
    canvas.supxlabel(look.axis.label, fontsize=9)
    canvas.supylabel(_AXIS_TITLE, fontsize=9)
    drawing.name_lines(canvas, [(text, colour, dash) for _, text, colour, dash in kinds])


OWN_METRIC = Figure(
    name="own-metric",
    title="Alignment of the update in the optimizer's own metric",
    caption="chi_k of the update proposed in the Euclidean metric, and in the metric of the "
    f"optimizer's preconditioner; of more than {_MOST_METRIC_PANELS} branches only the unsplit "
    f"ones. Running mean over {WINDOW:.0%} of a run. " + BAND,
    needs=(_EUCLIDEAN, _OWN),
    curves=_metric_curves,
    draw=_draw_metrics,
    size=_metric_size,
)


_LATE = 0.5
_KINDS: Mapping[str, tuple[str, Mark]] = {
    "alignment_gradient": ("full gradient", Mark("#0072b2")),
    "alignment_minibatch": ("mini-batch gradient", Mark("#b07800", "D", hollow=True)),
}


def _late_means(source: Source) -> dict[str, Dots | None]:
    branches = unsplit(branches_of(source.data, source.roles), source.roles)
    if len(branches) < 2:
        raise NotDrawableError("fewer than two unsplit branches to compare")
    return {
        f"{name}|{branch}": Dots(
            branch,
            {
                seed: mean_since(table, name, _LATE)
                for seed, table in seed_tables(source.data, branch).items()
            },
        )
        for branch in branches
        for name in _KINDS
        if name in source.data.columns
    }


def _draw_late_means(canvas: Canvas, dots: Mapping[str, Dots | None], look: Look) -> None:
    rows: dict[str, DotRow] = {}
    for name, drawn in dots.items():
        if drawn is not None and drawn.finite:
            mark = _KINDS[name.partition("|")[0]][1]
            before = rows.get(drawn.branch, DotRow("")).dots
            rows[drawn.branch] = DotRow(look.styles[drawn.branch].label, [*before, (drawn, mark)])
    axes = canvas.subplots()
    draw_rows(axes, list(rows.values()), logarithmic=False, line=None)
    name_marks(axes, dict(_KINDS.values()))
    axes.set_xlim(0, 1.02)
    axes.set_xlabel(rf"mean alignment $\chi_k$ over the last {100 * _LATE:g} %")


def _late_size(dots: Mapping[str, Dots | None], look: Look) -> Size:
    return size_of_rows(len({drawn.branch for drawn in dots.values() if drawn}), marks=2)


BATCH_SIZE = Figure(
    name="batch-size",
    title="Alignment late in training, by batch size and noise",
    caption="Mean of chi_k over the last half of each unsplit branch. Dots: seeds; tick and bar: "
    "mean and 95 % t-interval.",
    needs=("alignment_gradient",),
    curves=_late_means,
    draw=_draw_late_means,
    size=_late_size,
)
