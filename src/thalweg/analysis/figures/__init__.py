"""Figures of a study, ready for a paper, each with the data behind it.

Every module here whose name ends in `_figures` defines figures, and registers each where it is
defined: a new figure is a new file. A plugin adds its own with `@register.figure(name)`.
"""

from __future__ import annotations

import importlib
import pkgutil

from thalweg.analysis.figures.figure import (
    Figure,
    NotDrawableError,
    SavedFigure,
    SavedFigures,
    figures_named,
    save_figures,
)

__all__ = [
    "Figure",
    "NotDrawableError",
    "SavedFigure",
    "SavedFigures",
    "figures_named",
    "save_figures",
]

_FIRST = ("branch_figures", "comparison_figures", "run_figures")
"""In a report these come first; the other modules' figures follow by name."""

_THEMES = [module.name for module in pkgutil.iter_modules(__path__)]
for _theme in (*_FIRST, *sorted({*_THEMES} - {*_FIRST})):
    if _theme.endswith("_figures"):
        importlib.import_module(f"{__name__}.{_theme}")
