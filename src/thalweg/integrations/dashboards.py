"""What dashboards have in common: names, one axis of steps, and no waiting for any of them.

Columns become "thalweg/sharpness", "thalweg/stability_margin", ...; the entries of a column of
lists "thalweg/eigenvalues/1", ... What was not measured is left out, and so are the terms of
effective learning rates, which a chart says nothing of; texts go where a dashboard has a place for
them.

Example:
    >>> scalars({"step": 3, "sharpness": 2.0, "eigenvalues": [2.0, 1.0], "caveat": None})
    {'thalweg/sharpness': 2.0, 'thalweg/eigenvalues/1': 2.0, 'thalweg/eigenvalues/2': 1.0}
"""

from __future__ import annotations

import math
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from thalweg.errors import ThalwegError

PREFIX = "thalweg/"
TERMS = ("lr_numerator", "lr_denominator")
"""Columns that begin so are no charts."""
WAITING = 1000
"""Rows that may wait for a slow dashboard; further ones are dropped, which is a failure."""
PATIENCE = 10.0
"""Seconds that a dashboard is waited for when it is closed."""


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a row, by their names in a dashboard."""
    found: dict[str, float] = {}
    for column, value in row.items():
        if column == "step" or value is None or isinstance(value, str) or column.startswith(TERMS):
            continue
        if isinstance(value, (list, tuple)):
            found |= {f"{column}/{place}": v for place, v in enumerate(value, start=1)}
        else:
            found[column] = value
    finite = {name: float(v) for name, v in found.items() if v is not None}
    return {f"{PREFIX}{name}": value for name, value in finite.items() if math.isfinite(value)}


def texts(row: Mapping[str, Any]) -> dict[str, str]:
    """The texts of a row, by their names in a dashboard."""
    return {f"{PREFIX}{name}": v for name, v in row.items() if isinstance(v, str) and v}


class LeftBehind(ThalwegError):
    """A dashboard is slower than the rows come, or did not take them in time."""


class Dashboard(ABC):
    """Base of sinks that hand rows to a service: in a thread of its own, so that nobody waits.

    An error of the service is raised by the next `log`, where `Sinks` makes a warning of it.
    """

    def __init__(self) -> None:
        self._rows: queue.Queue[tuple[dict[str, Any], int] | None] = queue.Queue(WAITING)
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None

    @abstractmethod
    def send(self, row: Mapping[str, Any], step: int) -> None:
        """Hand a row to the service; it may take its time."""

    def end(self) -> None:
        """Say to the service that no row follows; it may take its time."""
        return

    def log(self, row: Mapping[str, Any], step: int) -> None:
        """Take a row, which the service gets as soon as it can.

        Raises:
            LeftBehind: more than `WAITING` rows wait already.
            Exception: whatever the service raised for an earlier row.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True)
            self._thread.start()
        try:
            self._rows.put_nowait((dict(row), step))
        except queue.Full:
            raise LeftBehind(f"{WAITING} rows wait for it; this one is dropped") from None
        self._raise_error()

    def close(self) -> None:
        """Wait for the rows that are on their way, `PATIENCE` seconds at most.

        Raises:
            LeftBehind: that was not enough.
            Exception: whatever the service raised.
        """
        if self._thread is None:
            return
        thread, self._thread = self._thread, None
        try:
            self._rows.put(None, timeout=PATIENCE)
        except queue.Full:
            raise LeftBehind(f"it takes no rows; {self._rows.qsize()} are lost") from None
        thread.join(PATIENCE)
        self._raise_error()
        if thread.is_alive():
            raise LeftBehind(f"it did not take its last rows within {PATIENCE:.0f} s")

    def _work(self) -> None:
        while (taken := self._rows.get()) is not None:
            try:
                self.send(*taken)
            except Exception as error:
                self._error = error
        try:
            self.end()
        except Exception as error:
            self._error = error

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error
