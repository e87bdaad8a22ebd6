"""Where are figures registered, and which does a list of names mean?

The built-in ones are listed in `catalogue.py`; a later study adds its own with `add_figure`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from thalweg.errors import invalid, unknown_name
from thalweg.lab.figures.saving import Figure

FIGURES: dict[str, Figure[Any]] = {}


def add_figure(figure: Figure[Any]) -> Figure[Any]:
    """Register a figure under its name; raises InvalidInput if the name is taken."""
    if figure.name in FIGURES:
        raise invalid("figure name", figure.name, "a name not used yet", "choose another name")
    FIGURES[figure.name] = figure
    return figure


def figures_named(names: Iterable[str | Figure[Any]] | None) -> list[Figure[Any]]:
    """The figures of these names, in their order; None: all. A figure itself stays as it is.

    Raises InvalidInput for a name that is not registered, with the nearest one.
    """
    if names is None:
        return list(FIGURES.values())
    return [_figure(name) if isinstance(name, str) else name for name in names]


def _figure(name: str) -> Figure[Any]:
    if name not in FIGURES:
        raise unknown_name("figure", name, FIGURES)
    return FIGURES[name]
