"""Figures of a study, ready for a paper, each with the data behind it."""

from __future__ import annotations

from thalweg.lab.figures.catalogue import FIGURES, add_figure, figures_named, save_figures
from thalweg.lab.figures.saving import Figure, NotDrawableError, SavedFigure, SavedFigures

__all__ = [
    "FIGURES",
    "Figure",
    "NotDrawableError",
    "SavedFigure",
    "SavedFigures",
    "add_figure",
    "figures_named",
    "save_figures",
]
