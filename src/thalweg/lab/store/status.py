"""How far is a run? Its `status.json`: state, step, last numbers, and which process wrote it."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from thalweg.errors import IntegrityError, InvalidInput, shown, unknown_name
from thalweg.lab.store import durable
from thalweg.lab.store.belonging import FORMAT, check_format

State = Literal["waiting", "running", "interrupted", "done", "diverged", "failed"]
STATES: tuple[str, ...] = get_args(State)
_NUMBERS = ("loss", "alignment", "sharpness")
_TEXT, _COUNT, _NUMBER = (str,), (int,), (int, float)
_MAYBE_COUNT, _MAYBE_NUMBER = (int, type(None)), (float, type(None))
_KINDS: dict[str, tuple[type, ...]] = {
    "state": _TEXT,
    "step": _COUNT,
    "end_step": _MAYBE_COUNT,
    "seconds": _NUMBER,
    **dict.fromkeys(_NUMBERS, _MAYBE_NUMBER),
    "message": _TEXT,
    "pid": _COUNT,
    "host": _TEXT,
    "updated": _TEXT,
    "run_hash": _TEXT,
    "rows": _MAYBE_COUNT,
    "format": _COUNT,
}


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
        run_hash: hash of the run; empty: not known.
        rows: how many rows of metrics a run that is done has; None: not known.
        format: version of the form in which it is written.
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
    run_hash: str = ""
    rows: int | None = None
    format: int = FORMAT

    def __post_init__(self) -> None:
        if self.state not in STATES:
            raise unknown_name("state of a run", self.state, STATES)


def write_status(path: Path, status: Status) -> None:
    """Replace `status.json` in one instant; a reader sees the old one or the new one."""
    # As it is read back: NaN is text in JSON.
    content = json.loads(durable.to_json(asdict(status)))
    content["sha256"] = durable.digest_of(content)
    durable.write_file(path, durable.to_json(content))


def read_status(path: Path) -> Status | None:
    """Read `status.json`; None if there is none.

    Raises:
        InvalidInput: a later version of Thalweg wrote it.
        IntegrityError: it is damaged.
    """
    try:
        content = durable.read_json(path)
    except FileNotFoundError:
        return None
    if isinstance(content, dict) and "format" in content:
        check_format(path, content["format"])
    # The first files of format 3 had no digest.
    if isinstance(content, dict) and "sha256" in content:
        written = content.pop("sha256")
        if written != durable.digest_of(content):
            raise IntegrityError(
                f"{path}: damaged, its SHA-256 is not the one written; remove it, then resume the"
                " run"
            )
    try:
        return Status(**_typed_values(content))
    except (TypeError, ValueError, AttributeError, OverflowError, InvalidInput) as error:
        raise IntegrityError(
            f"{path}: damaged ({error}); remove it, then resume the run"
        ) from error


def _typed_values(content: Any) -> dict[str, Any]:
    """The values of a status, each of the type that it must have."""
    values: dict[str, Any] = {"format": 1}
    for name, kinds in _KINDS.items():
        if name not in content:
            continue
        value = content[name]
        if name in _NUMBERS and value is not None:
            value = float(value)  # "nan" and "inf" are text in JSON
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise TypeError(f"{name} is {shown(value, 80)}")
        values[name] = value
    return values
