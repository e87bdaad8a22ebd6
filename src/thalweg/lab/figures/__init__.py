"""Figures of a study, ready for a paper, each with the data behind it."""

from __future__ import annotations

from thalweg.lab.figures.catalogue import FIGURES, add_figure, save_figures
from thalweg.lab.figures.saving import Figure, SavedFigure, SavedFigures

__all__ = ["FIGURES", "Figure", "SavedFigure", "SavedFigures", "add_figure", "save_figures"]
