"""Figure of the sharpness itself: where learning rates change, its product with them hides it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from thalweg.lab.figures.along_steps import Quantity, draw_each_branch, size_of_branches
from thalweg.lab.figures.curves import column
from thalweg.lab.figures.drawing import LOG_BAND, Look
from thalweg.lab.figures.saving import Curves, Figure, Source

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas


def _curves(source: Source) -> Curves:
    return source.each_branch("sharpness", column("sharpness"), logarithmic=True)


def _draw(canvas: Canvas, curves: Curves, look: Look) -> None:
    draw_each_branch(canvas, curves, look, Quantity("sharpness", r"sharpness $\lambda_1$"))


SHARPNESS_OF_BRANCHES = Figure(
    name="sharpness-of-branches",
    title="Sharpness of the branches",
    caption="Largest eigenvalue of the Hessian of the full training loss along each branch. "
    + LOG_BAND,
    needs=("sharpness",),
    curves=_curves,
    draw=_draw,
    size=size_of_branches(),
)
