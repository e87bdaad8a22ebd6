"""What goes wrong in a process; light to import, for a process imports where its function is."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from thalweg.errors import MissingExtra


def trouble(path: str, seed: int, branch: str, *more: Any) -> None:
    """In place of a run: what its file `kind` says, so many times, then nothing.

    Such as "SIGKILL 1", "sleep 9", or "compute 9 SECONDS".
    """
    run = Path(path) / f"seed-{seed}" / branch
    with (run / "begun").open("a") as file:
        file.write("x")
    kind = run / "kind"
    how = kind.read_text().split() if kind.is_file() else []
    if not how or len((run / "begun").read_text()) > int(how[1]):
        return
    if how[0] == "sleep":
        time.sleep(1000)
    if how[0] == "compute":
        until = time.process_time() + float(how[2])
        while time.process_time() < until:
            pass
    else:
        send_oneself(how[0])


class Own(MissingExtra):
    """An error of a user's own, which the parent does not know."""


def refuse() -> None:
    """Raise it."""
    raise Own("no such package")


def send_oneself(name: str) -> None:
    """A signal, such as "SIGKILL"."""
    os.kill(os.getpid(), getattr(signal, name))
