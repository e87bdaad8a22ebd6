"""Figures of the Hessian's eigenvalues, and of sharpness against the edge of stability."""

from __future__ import annotations

from typing import TYPE_CHECKING

from thalweg.analysis.figures import drawing
from thalweg.analysis.figures.along_steps import (
    Quantity,
    draw_each_branch,
    figure_of_branches,
    size_of_branches,
)
from thalweg.analysis.figures.curves import column, entry, list_length
from thalweg.analysis.figures.drawing import BAND, LOG_BAND, Look
from thalweg.analysis.figures.saving import Curves, Figure, Source

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas


def _spectrum_curves(source: Source) -> Curves:
    both = list_length(source.data, "solved_eigenvalues")
    return {
        f"lambda_{index + 1}|{branch}": source.curve(
            branch, entry("solved_eigenvalues", index), logarithmic=True
        )
        for index in range(both)
        for branch in source.plain_and_trunk()
    }


def _draw_spectrum(canvas: Canvas, curves: Curves, look: Look) -> None:
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


EIGENVALUES = Figure(
    name="eigenvalues",
    title="Eigenvalues of the Hessian, top k against next k",
    caption="The 2k largest eigenvalues along the unsplit run, each from a converged solve "
    "(dots). Geometric mean over seeds at each rank.",
    needs=("solved_eigenvalues",),
    curves=_spectrum_curves,
    draw=_draw_spectrum,
)


SHARPNESS = figure_of_branches(
    "sharpness",
    "Sharpness against the edge of stability",
    "Learning rate times sharpness along each branch; line: 2, beyond which plain gradient descent "
    "is unstable. " + BAND,
    Quantity("lr_sharpness", r"$\eta\,\lambda_1$", line=(2.0, "")),
)

# The sharpness itself: where learning rates change, its product with them hides it.
SHARPNESS_OF_BRANCHES = figure_of_branches(
    "sharpness-of-branches",
    "Sharpness of the branches",
    "Largest eigenvalue of the Hessian of the full training loss along each branch. " + LOG_BAND,
    Quantity("sharpness", r"sharpness $\lambda_1$"),
    geometric=True,
)

#: Sharpness over threshold: what is above is cut off.
_MOST_OVER = 2.5


def _stability_curves(source: Source) -> Curves:
    return source.each_branch("stability_ratio", column("stability_ratio"))


def _draw_stability(canvas: Canvas, curves: Curves, look: Look) -> None:
    # Adam's first steps, before its second moments have grown, are far above: they are cut off.
    highest = min(_MOST_OVER, max(float(line.high.max()) for line in curves.values() if line))
    quantity = Quantity(
        "stability_ratio",
        "sharpness / threshold",
        limits=(0.0, 1.05 * max(1.0, highest)),
        line=(1.0, ""),
    )
    draw_each_branch(canvas, curves, look, quantity)


STABILITY = Figure(
    name="stability",
    title="Sharpness over the optimizer's own stability threshold",
    caption="Sharpness (preconditioned, where the optimizer has a preconditioner) over the "
    "threshold of full-batch training with this optimizer; line: 1, the edge of stability. What is "
    "above 2.5 is cut off. " + BAND,
    needs=("stability_ratio",),
    curves=_stability_curves,
    draw=_draw_stability,
    size=size_of_branches(),
)
