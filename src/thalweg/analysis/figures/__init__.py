"""Figures of a study, ready for a paper, each with the data behind it."""

from __future__ import annotations

from thalweg.analysis.figures.catalogue import figures_named, save_figures
from thalweg.analysis.figures.saving import Figure, NotDrawableError, SavedFigure, SavedFigures

__all__ = [
    "Figure",
    "NotDrawableError",
    "SavedFigure",
    "SavedFigures",
    "figures_named",
    "save_figures",
]
