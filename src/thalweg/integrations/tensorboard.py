"""Measured rows in TensorBoard: `watch(..., sinks=["tensorboard:runs/mine"])`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from thalweg.errors import require_extra
from thalweg.integrations.dashboards import scalars, texts
from thalweg.registry import sinks


@sinks.register("tensorboard")
class TensorBoard:
    """Writes rows as event files, at the steps of the training.

    A run that resumes goes on in the same charts, if it is given the same folder.

    Args:
        folder: where the event files go; that of the trainer shows both in one run.
        resume_at: of what an earlier process wrote there, show the steps before this one alone.

    Raises:
        MissingExtra: tensorboard is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str], *, resume_at: int | None = None) -> None:
        require_extra("tensorboard", "tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(os.fspath(folder), purge_step=resume_at)

    def log(self, row: Mapping[str, Any], step: int) -> None:
        """Write a row; it is on disk when this returns."""
        for name, value in scalars(row).items():
            self._writer.add_scalar(name, value, step)
        for name, text in texts(row).items():
            self._writer.add_text(name, text, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()
