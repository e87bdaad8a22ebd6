"""Measured rows in trackio: `watch(..., sinks=["trackio:my-project"])`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from thalweg.errors import require_extra
from thalweg.integrations.dashboards import Dashboard, scalars
from thalweg.registry import sinks


@sinks.register("trackio")
class Trackio(Dashboard):
    """Logs rows to a run, at the steps of the training.

    A run that resumes goes on in the same charts, from behind the last step that it has: trackio
    keeps the rows that were logged after the checkpoint, and would show those steps twice. Where
    the run is the user's, whose steps are not ours alone, all rows are logged.

    Args:
        project: of a run that is begun and ended here, where none is active; one that is active is
            used, and left open.
        name: of that run; one of this name that is there already is continued.

    Raises:
        MissingExtra: trackio is not installed.
        Exception: whatever trackio raises where it cannot begin a run.
    """

    def __init__(self, project: str = "thalweg", *, name: str | None = None) -> None:
        super().__init__()
        require_extra("trackio", "trackio")
        # By its name: this module is called as the library is.
        trackio: Any = importlib.import_module("trackio")
        active = importlib.import_module("trackio.context_vars").current_run.get()
        self._own = active is None
        resume = "never" if name is None else "allow"
        self._run: Any = active or trackio.init(project=project, name=name, resume=resume)
        # Trackio has no other word for it.
        self._begin: int = getattr(self._run, "_next_step", 0) if self._own else 0

    def send(self, row: Mapping[str, Any], step: int) -> None:
        """Log a row, unless an earlier process has."""
        if step < self._begin:
            return
        self._run.log(scalars(row), step=step)

    def end(self) -> None:
        """End a run that was begun here."""
        if self._own:
            self._run.finish()
