"""Where are figures registered, and which does a list of names mean?

The built-in ones are listed in `catalogue.py`; a plugin adds its own: `@register.figure(name)`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from thalweg import registry
from thalweg.analysis.figures.saving import Figure


def figures_named(names: Iterable[str | Figure[Any]] | None) -> list[Figure[Any]]:
    """The figures of these names, in their order; None: all. A figure itself stays as it is.

    Raises InvalidInput for a name that is not registered, with the nearest one.
    """
    if names is None:
        return list(registry.figures.values())
    return [registry.figures.find(name) if isinstance(name, str) else name for name in names]
