"""How far is a run? Its `status.json`: state, step, last numbers, and which process wrote it."""

from __future__ import annotations

import os
import socket
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from thalweg.errors import IntegrityError, shown, unknown_name
from thalweg.lab.store import durable

State = Literal["waiting", "running", "interrupted", "done", "diverged", "failed"]
STATES: tuple[str, ...] = get_args(State)
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("state", "message", "host", "updated"), (str,)),
    **dict.fromkeys(("step", "pid"), (int,)),
    "end_step": (int, type(None)),
    "seconds": (int, float),
    **dict.fromkeys(("loss", "alignment", "sharpness"), (float, type(None))),
}
_NUMBERS = ("loss", "alignment", "sharpness")


def utc_now() -> str:
    """Return the time as ISO text, to the second, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


@dataclass(frozen=True)
class Status:
    """One moment of a run.

    Attributes:
        state: one of `STATES`.
        step, end_step: updates made, and to be made (None while the end is a condition).
        seconds: time spent in the loop, all sittings together.
        loss, alignment, sharpness: the last measured ones.
        message: one line for people, such as why the run failed.
        pid, host, updated: who wrote this, and when (UTC).
    """

    state: State
    step: int = 0
    end_step: int | None = None
    seconds: float = 0.0
    loss: float | None = None
    alignment: float | None = None
    sharpness: float | None = None
    message: str = ""
    pid: int = field(default_factory=os.getpid)
    host: str = field(default_factory=socket.gethostname)
    updated: str = field(default_factory=utc_now)

    def __post_init__(self) -> None:
        if self.state not in STATES:
            raise unknown_name("state of a run", self.state, STATES)


def write_status(path: Path, status: Status) -> None:
    """Replace `status.json` in one instant; a reader sees the old one or the new one."""
    durable.write_file(path, durable.to_json(asdict(status)))


def read_status(path: Path) -> Status | None:
    """Read `status.json`; None if there is none.

    Raises:
        IntegrityError: it is damaged.
    """
    try:
        content = durable.read_json(path)
        known = {f.name for f in fields(Status)}
        values: dict[str, Any] = {name: content[name] for name in known & content.keys()}
        for name in _NUMBERS:  # "nan" and "inf" are text in JSON
            if values.get(name) is not None:
                values[name] = float(values[name])
        for name, value in values.items():
            if not isinstance(value, _TYPES[name]) or isinstance(value, bool):
                raise TypeError(f"{name} is {shown(value, 80)}")
        return Status(**values)
    except FileNotFoundError:
        return None
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise IntegrityError(
            f"{path}: damaged ({error}); remove it, then resume the run"
        ) from error
