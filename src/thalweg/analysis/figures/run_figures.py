"""Figures of several quantities along the unsplit run: alignments, eigenvalues, critical rates.

Split branches would show 0 or 1 for the alignment of their update by construction, and many lines
of each branch would be too many.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from thalweg.analysis.figures import drawing
from thalweg.analysis.figures.along_steps import Line, figure_of_run
from thalweg.analysis.figures.curves import entry, list_length
from thalweg.analysis.figures.drawing import BAND, LOG_BAND, Look
from thalweg.analysis.figures.figure import Curves, Figure, Source
from thalweg.analysis.quantities import BLOCKS, quantities
from thalweg.registry import figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

figures.add_named(
    figure_of_run(
        "alignment",
        "Alignment with the dominant subspace",
        "chi_k, the part of a vector's length that lies in the dominant subspace, along the "
        "unsplit run: of the full gradient, of the mini-batch gradient, of the update. Running "
        f"mean over {quantities['alignment_gradient'].window:.0%} of a run. " + BAND,
        Line("alignment_gradient", "#0072b2"),
        Line("alignment_minibatch", "#e69f00", (4.0, 1.5)),
        Line("alignment_update", "#cc79a7", (1.2, 1.2)),
        axis="alignment χₖ",
        needs=("alignment_gradient",),
    )
)

figures.add_named(
    figure_of_run(
        "critical-learning-rates",
        "Critical learning rates of the dominant and the bulk step",
        "Learning rate at which one projected step leaves the expected loss as it is (in the "
        "quadratic approximation), along the unsplit run. Where the learning rate set lies between "
        "the two, the bulk step lowers the loss and the dominant step raises it. " + LOG_BAND,
        Line("critical_lr_dominant", "#d55e00", (4.0, 1.5)),
        Line("critical_lr_bulk", "#009e73", (6.0, 1.5, 1.2, 1.5)),
        Line("learning_rate", drawing.INK, width=0.8),
        axis="learning rate",
    )
)

_COLOURS = ("#0072b2", "#009e73", "#a07000", "#d55e00", "#7a3b8f")

figures.add_named(
    figure_of_run(
        "block-sharpness",
        "Average sharpness of the blocks of the Transformer",
        "Trace of each block's Hessian over its number of parameters along the unsplit run, "
        "estimated with few products (dots; negative estimates are not drawn). " + LOG_BAND,
        *(
            Line(f"block_sharpness_{block}", colour, width=1.2)
            for block, colour in zip(BLOCKS, _COLOURS, strict=True)
        ),
        axis="average sharpness",
        points=True,
    )
)


def _eigenvalue_curves(source: Source) -> Curves:
    return {
        f"lambda_{index + 1}|{branch}": source.curve(
            branch, entry("solved_eigenvalues", index), logarithmic=True
        )
        for index in range(list_length(source.data, "solved_eigenvalues"))
        for branch in source.plain_and_trunk()
    }


def _draw_eigenvalues(canvas: Canvas, curves: Curves, look: Look) -> None:
    axes = canvas.subplots()
    axes.set_yscale("log")
    lines = [(int(name.partition("|")[0][7:]), line) for name, line in curves.items() if line]
    k = max(index for index, _ in lines) // 2
    ends: dict[bool, list[float]] = {True: [], False: []}
    for index, line in lines:
        top = index <= k
        colour = "#0072b2" if top else "#d55e00"
        style = drawing.BranchStyle("", colour, colour, () if top else (3.0, 1.0), 0.8)
        drawing.draw_curve(axes, line, style, band=False)
        axes.plot(line.steps, line.center, ".", color=colour, markersize=3.6, markeredgewidth=0)
        if line.branch != "trunk" or look.axis.branch_point is None:
            ends[top].append(float(line.center[-1]))
    axes.set_ylabel(r"eigenvalue $\lambda_i$ of the Hessian")
    drawing.mark_branch_point(axes, look.axis)
    drawing.finish_steps(axes, look.axis)
    drawing.plain_log_ticks(axes)
    names = {True: rf"$\lambda_1 \ldots \lambda_{{{k}}}$"}
    names[False] = rf"$\lambda_{{{k + 1}}} \ldots \lambda_{{{2 * k}}}$"
    colours = {True: "#0072b2", False: "#d55e00"}
    drawing.label_ends(
        axes,
        [
            (names[top], sorted(values)[len(values) // 2], colours[top])
            for top, values in ends.items()
            if values
        ],
    )


figures.add_named(
    Figure(
        name="eigenvalues",
        title="Eigenvalues of the Hessian, top k against next k",
        caption="The 2k largest eigenvalues along the unsplit run, each from a converged solve "
        "(dots). Geometric mean over seeds at each rank.",
        needs=("solved_eigenvalues",),
        curves=_eigenvalue_curves,
        draw=_draw_eigenvalues,
    )
)
