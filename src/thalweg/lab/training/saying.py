"""How does a run say where it stands? Its `status.json`, at most once a second while it goes on."""

from __future__ import annotations

import time

from thalweg.lab.store import RunFolder
from thalweg.lab.store.status import State, Status
from thalweg.lab.training.progression import Progression
from thalweg.lab.training.recording import Recorder

STATUS_SECONDS = 1.0


class StatusWriter:
    """Writes the status of a run, and counts the seconds of all its sittings."""

    def __init__(self, folder: RunFolder, progression: Progression, recorder: Recorder) -> None:
        self._folder = folder
        self._progression = progression
        self._recorder = recorder
        self._begun = time.monotonic()
        self._written = 0.0
        self._earlier_seconds = 0.0

    def continue_from(self, earlier: Status | None) -> None:
        """Count on from an earlier sitting."""
        self._earlier_seconds = earlier.seconds if earlier else 0.0

    def running(self) -> None:
        """Say that the run goes on, if it has not been said within the last second."""
        if time.monotonic() - self._written >= STATUS_SECONDS:
            self.write("running")

    def write(self, state: State, message: str | None = None) -> None:
        """Replace the status; without a message, it is what is to be said of the phases."""
        self._written = time.monotonic()
        last = self._recorder.last
        position = self._progression.position
        self._folder.write_status(
            Status(
                state=state,
                step=position.step,
                end_step=self._progression.end_step,
                seconds=self._earlier_seconds + time.monotonic() - self._begun,
                loss=last.get("loss"),
                alignment=last.get("alignment_gradient"),
                sharpness=last.get("sharpness"),
                message=position.message if message is None else message,
            )
        )
