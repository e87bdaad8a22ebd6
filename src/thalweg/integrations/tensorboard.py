"""Measured rows in TensorBoard: `watch(..., sinks=["tensorboard:runs/mine"])`."""

from __future__ import annotations

import importlib
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
        resume_at: of what was written there before, show the steps before this one alone. Other
            writers of a resumed run into this folder are to be made after this one.

    Raises:
        MissingExtra: tensorboard is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str], *, resume_at: int | None = None) -> None:
        require_extra("tensorboard", "tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(os.fspath(folder), purge_step=resume_at)
        if resume_at is not None:
            self._say_again(resume_at)

    def _say_again(self, step: int) -> None:
        """That a session starts, once more than torch does.

        TensorBoard takes the first of a run that it meets for its beginning, not for a restart, and
        would show the steps since twice; torch writes none where nothing resumes.
        """
        events: Any = importlib.import_module("tensorboard.compat.proto.event_pb2")
        start = events.SessionLog(status=events.SessionLog.START)
        self._writer.file_writer.add_event(events.Event(session_log=start), step)

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
