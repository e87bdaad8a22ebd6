"""Figure of the noise of mini-batch gradients: how much of it lies in the dominant subspace."""

from __future__ import annotations

from thalweg.analysis.figures.along_steps import Quantity, figure_of_branches
from thalweg.analysis.figures.drawing import BAND

NOISE = figure_of_branches(
    "noise",
    "Share of the gradient noise in the dominant subspace",
    "Part of the variance of the mini-batch gradient that lies in the dominant subspace, along "
    "each branch. " + BAND,
    Quantity("noise_share_dominant", "share of the noise in $S_k$", limits=(0.0, 1.02)),
    share_y=True,
)
