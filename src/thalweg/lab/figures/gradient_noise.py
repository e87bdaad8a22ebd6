"""Figure of the noise of mini-batch gradients: how much of it lies in the dominant subspace."""

from __future__ import annotations

from typing import TYPE_CHECKING

from thalweg.lab.figures.along_steps import Quantity, draw_each_branch, size_of_branches
from thalweg.lab.figures.curves import column
from thalweg.lab.figures.drawing import BAND, Look
from thalweg.lab.figures.saving import Curves, Figure, Source

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas


def _noise_curves(source: Source) -> Curves:
    return source.each_branch("noise_share_dominant", column("noise_share_dominant"))


def _draw_noise(canvas: Canvas, curves: Curves, look: Look) -> None:
    quantity = Quantity("noise_share_dominant", "share of the noise in $S_k$", limits=(0.0, 1.02))
    draw_each_branch(canvas, curves, look, quantity, share_y=True)


NOISE = Figure(
    name="noise",
    title="Share of the gradient noise in the dominant subspace",
    caption="Part of the variance of the mini-batch gradient that lies in the dominant subspace, "
    "along each branch. " + BAND,
    needs=("noise_share_dominant",),
    curves=_noise_curves,
    draw=_draw_noise,
    size=size_of_branches(),
)
