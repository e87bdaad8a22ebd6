"""Measured rows in MLflow: `watch(..., sinks=["mlflow"])`."""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping
from typing import Any

from thalweg.errors import require_extra
from thalweg.integrations.dashboards import Dashboard, scalars, texts
from thalweg.registry import sinks


@sinks.register("mlflow")
class MLflow(Dashboard):
    """Logs rows to a run, at the steps of the training; texts as tags of the run.

    Args:
        experiment: of a run that is begun and ended here, where none is active; one that is active
            is used, and left open: `mlflow.start_run(run_id=...)` before goes on in its charts.

    Raises:
        MissingExtra: mlflow is not installed.
        Exception: whatever MLflow raises where it cannot begin a run.
    """

    def __init__(self, experiment: str = "thalweg") -> None:
        super().__init__()
        require_extra("mlflow", "mlflow")
        # By its name: this module is called as the library is.
        mlflow: Any = importlib.import_module("mlflow")
        self._client: Any = mlflow.MlflowClient()
        active = mlflow.active_run()
        self._own = active is None
        if self._own:
            found = self._client.get_experiment_by_name(experiment)
            identity = found.experiment_id if found else self._client.create_experiment(experiment)
            active = self._client.create_run(identity)
        self._run_id: str = active.info.run_id
        self._metric: Any = mlflow.entities.Metric

    def send(self, row: Mapping[str, Any], step: int) -> None:
        """Log a row."""
        now = int(1000 * time.time())
        metrics = [self._metric(name, value, now, step) for name, value in scalars(row).items()]
        self._client.log_batch(self._run_id, metrics=metrics)
        for name, text in texts(row).items():
            self._client.set_tag(self._run_id, name, text)

    def end(self) -> None:
        """End a run that was begun here."""
        if self._own:
            self._client.set_terminated(self._run_id)
