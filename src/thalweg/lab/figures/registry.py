"""Where are figures registered, and which does a list of names mean?

The built-in ones are listed in `catalogue.py`; a later study adds its own with `add_figure`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from thalweg.lab.figures.saving import Figure
from thalweg.named import Named

FIGURES: Named[Figure[Any]] = Named("figure")
add_figure = FIGURES.add


def figures_named(names: Iterable[str | Figure[Any]] | None) -> list[Figure[Any]]:
    """The figures of these names, in their order; None: all. A figure itself stays as it is.

    Raises InvalidInput for a name that is not registered, with the nearest one.
    """
    if names is None:
        return list(FIGURES.values())
    return [FIGURES.find(name) if isinstance(name, str) else name for name in names]
