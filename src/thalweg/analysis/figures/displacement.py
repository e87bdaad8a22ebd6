"""Figures of where the branches go: distance from the branch point, and how the subspace turns."""

from __future__ import annotations

from thalweg.analysis.figures.along_steps import Quantity, figure_of_branches
from thalweg.analysis.figures.drawing import BAND

DISTANCE = figure_of_branches(
    "distance",
    "Distance from the branch point",
    "Length of the parameters' way from the branch point, as the crow flies, split on the dominant "
    "subspace there. The two parts have different scales. " + BAND,
    *(Quantity(f"displacement_{part}", f"distance,\n{part} part") for part in ("dominant", "bulk")),
    height=3.4,
)

OVERLAP = figure_of_branches(
    "overlap",
    "Overlap of the dominant subspace with that at the branch point",
    "Mean squared cosine, trace(P P')/k, of the dominant subspace with that at the branch point. "
    + BAND,
    Quantity("overlap_branch_point", "overlap", limits=(0.0, 1.02)),
    share_y=True,
)
