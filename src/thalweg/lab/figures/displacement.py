"""Figures of where the branches go: distance from the branch point, and how the subspace turns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from thalweg.lab.figures.along_steps import Quantity, draw_each_branch, size_of_branches
from thalweg.lab.figures.curves import column
from thalweg.lab.figures.drawing import BAND, Look
from thalweg.lab.figures.saving import Curves, Figure, Source

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

_PARTS = ("dominant", "bulk")


def _distance_curves(source: Source) -> Curves:
    columns = [f"displacement_{part}" for part in _PARTS]
    return {
        name: line
        for quantity in columns
        for name, line in source.each_branch(quantity, column(quantity)).items()
    }


def _draw_distance(canvas: Canvas, curves: Curves, look: Look) -> None:
    parts = [Quantity(f"displacement_{part}", f"distance,\n{part} part") for part in _PARTS]
    draw_each_branch(canvas, curves, look, *parts)


DISTANCE = Figure(
    name="distance",
    title="Distance from the branch point",
    caption="Length of the parameters' way from the branch point, as the crow flies, split on the "
    "dominant subspace there. The two parts have different scales. " + BAND,
    needs=tuple(f"displacement_{part}" for part in _PARTS),
    curves=_distance_curves,
    draw=_draw_distance,
    size=size_of_branches(quantities=2, height=3.4),
)


def _overlap_curves(source: Source) -> Curves:
    return source.each_branch("overlap_branch_point", column("overlap_branch_point"))


def _draw_overlap(canvas: Canvas, curves: Curves, look: Look) -> None:
    quantity = Quantity("overlap_branch_point", "overlap", limits=(0.0, 1.02))
    draw_each_branch(canvas, curves, look, quantity, share_y=True)


OVERLAP = Figure(
    name="overlap",
    title="Overlap of the dominant subspace with that at the branch point",
    caption="Mean squared cosine, trace(P P')/k, of the dominant subspace with that at the branch "
    "point. " + BAND,
    needs=("overlap_branch_point",),
    curves=_overlap_curves,
    draw=_draw_overlap,
    size=size_of_branches(),
)
