"""What is a figure, and which files does it leave?

A `Figure` turns the metric table into curves and draws them. It is saved as PNG (200 dpi) and PDF,
with the drawn curves as CSV beside them. The figures themselves are in `figures.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from thalweg.lab.figures import drawing
from thalweg.lab.figures.curves import Curve, Series, StepAxis, branches_of, curve, tidy
from thalweg.lab.figures.drawing import Look

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure as Canvas

#: Curves by name, `quantity|branch`; None where a branch never measured the quantity.
Curves = Mapping[str, Curve | None]


@dataclass(frozen=True)
class Source:
    """What the curves of a figure are made of."""

    data: pd.DataFrame
    axis: StepAxis
    roles: Mapping[str, str]

    def curve(self, branch: str, series: Series, *, logarithmic: bool = False) -> Curve | None:
        """The quantity along one branch; None where it was never measured."""
        return curve(self.data, branch, series, self.axis, logarithmic=logarithmic)

    def each_branch(
        self, quantity: str, series: Series, *, logarithmic: bool = False
    ) -> dict[str, Curve | None]:
        """One curve for each branch that measured the quantity."""
        return {
            f"{quantity}|{branch}": self.curve(branch, series, logarithmic=logarithmic)
            for branch in branches_of(self.data, self.roles)
        }


@dataclass(frozen=True)
class Figure:
    """One figure: what it needs, what it shows, how it is drawn.

    needs    columns of the metric table; without one of them the figure is skipped
    curves   study -> the curves drawn
    draw     draws these curves on an empty matplotlib figure
    size     width and height in inches
    """

    name: str
    title: str
    caption: str
    needs: tuple[str, ...]
    curves: Callable[[Source], Curves]
    draw: Callable[[Canvas, Curves, Look], None]
    size: tuple[float, float] = (drawing.COLUMN_WIDTH, 2.3)


@dataclass(frozen=True)
class SavedFigure:
    """Files of one figure."""

    name: str
    title: str
    caption: str
    png: Path
    pdf: Path
    csv: Path


@dataclass(frozen=True)
class SavedFigures:
    """Figures written, and those left out with the reason (name -> reason)."""

    saved: tuple[SavedFigure, ...]
    skipped: Mapping[str, str]


def save_figure(figure: Figure, curves: Curves, look: Look, folder: Path) -> SavedFigure:
    """Draw one figure and write its three files; an earlier version of them is replaced."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    png, pdf, csv = (folder / f"{figure.name}.{ending}" for ending in ("png", "pdf", "csv"))
    with drawing.paper_style():
        canvas = Canvas(figsize=figure.size, layout="constrained")
        FigureCanvasAgg(canvas)
        figure.draw(canvas, curves, look)
        # The files hold no date: the same data give the same bytes.
        canvas.savefig(png, metadata={"Title": figure.title, "Software": None})
        canvas.savefig(pdf, metadata={"Title": figure.title, "CreationDate": None})
    tidy(curves).to_csv(csv, index=False)
    return SavedFigure(figure.name, figure.title, figure.caption, png, pdf, csv)
