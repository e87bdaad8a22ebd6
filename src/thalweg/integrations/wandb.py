"""Measured rows in Weights & Biases: `watch(..., sinks=["wandb:my-project"])`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from thalweg.errors import require_extra
from thalweg.integrations.dashboards import PREFIX, Dashboard, scalars, texts
from thalweg.registry import sinks


@sinks.register("wandb")
class WeightsAndBiases(Dashboard):
    """Logs rows to a run, on an axis of their own: the steps of the training.

    The trainer's own logging to the same run is not disturbed, whatever its steps are. A run that
    resumes goes on in the same charts: `wandb.init(id=..., resume="allow")` before.

    Args:
        project: of a run that is begun and ended here, where none is active; one that is active is
            used, and left open.

    Raises:
        MissingExtra: wandb is not installed.
        Exception: whatever wandb raises where it cannot begin a run.
    """

    def __init__(self, project: str = "thalweg") -> None:
        super().__init__()
        require_extra("wandb", "wandb")
        # By its name: this module is called as the library is.
        self._wandb: Any = importlib.import_module("wandb")
        self._own = self._wandb.run is None
        self._run: Any = self._wandb.init(project=project) if self._own else self._wandb.run
        self._run.define_metric(f"{PREFIX}step", hidden=True)
        self._run.define_metric(f"{PREFIX}*", step_metric=f"{PREFIX}step")

    def send(self, row: Mapping[str, Any], step: int) -> None:
        """Log a row."""
        self._run.log({f"{PREFIX}step": step, **scalars(row), **texts(row)})

    def end(self) -> None:
        """End a run that was begun here."""
        if self._own:
            self._run.finish()
