"""A live plot in a notebook: `watch(..., sinks=["notebook"])`."""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping
from io import BytesIO
from typing import Any

from thalweg.errors import require_extra
from thalweg.integrations.watch_plot import draw
from thalweg.registry import sinks

SECONDS = 2.0
"""Between two drawings: one takes some tenths of a second."""


@sinks.register("notebook")
class Notebook:
    """Draws what was reported below the cell, and again as reports come.

    The plot is that of `watcher.plot()`. The last one is drawn when the watcher is closed.

    Args:
        seconds: between two drawings, at the least.

    Raises:
        MissingExtra: IPython or matplotlib is not installed.
    """

    def __init__(self, seconds: float = SECONDS) -> None:
        require_extra("notebook", "IPython", "matplotlib")
        self._seconds = seconds
        self._rows: list[Mapping[str, Any]] = []
        self._drawn = 0
        self._drawn_at = -seconds
        self._place: Any = None

    def log(self, row: Mapping[str, Any], step: int) -> None:
        """Take a row, and draw all of them, if it is time."""
        self._rows.append({"step": step, **row})
        if time.monotonic() - self._drawn_at >= self._seconds:
            self._draw()

    def close(self) -> None:
        """Draw what has come since the last time."""
        if self._drawn < len(self._rows):
            self._draw()

    def _draw(self) -> None:
        notebook: Any = importlib.import_module("IPython.display")
        image = BytesIO()
        draw(self._rows).savefig(image, format="png", dpi=110)
        shown = notebook.Image(data=image.getvalue(), format="png")
        if self._place is None:
            self._place = notebook.display(shown, display_id=True)
        else:
            self._place.update(shown)
        self._drawn, self._drawn_at = len(self._rows), time.monotonic()
