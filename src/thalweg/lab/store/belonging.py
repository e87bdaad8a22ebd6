"""To which run does a file belong, and is it of a format that can be read?

Each checkpoint, segment of metrics and status carries the hash of the run that wrote it (spec, seed
and branch, `thalweg.lab.identity`) and what came before it, so that a piece that is missing,
exchanged or of another run shows. Files of formats 1 and 2 carry none of this: they are read, and
what cannot be told of them is said to be not verifiable.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thalweg.errors import IntegrityError, InvalidInput

FORMAT = 3
"""Version of what is written into a study's folder; 3 is the first whose files say their run."""


@dataclass(frozen=True)
class Mark:
    """What a checkpoint says of its run.

    Attributes:
        run: hash of the run; empty: not known.
        rows: how many rows of metrics were measured before its step; None: not known.
        finished: whether the run had come to its end.
        bound: the end that the run had then, such as "12 steps"; empty: not known.
    """

    run: str = ""
    rows: int | None = None
    finished: bool = False
    bound: str = ""


def check_format(path: Path, written: Any) -> None:
    """Check that a file can be read by this version.

    Raises:
        InvalidInput: a later version wrote it.
        IntegrityError: its format is no number.
    """
    if isinstance(written, bool) or not isinstance(written, int) or written < 1:
        raise IntegrityError(f"{path}: damaged, its format is {written!r}, not a number from 1")
    if written > FORMAT:
        raise InvalidInput(
            f"{path}: format: got {written}, allowed: 1 to {FORMAT}; a later version of Thalweg"
            " wrote it: pip install --upgrade thalweg"
        )


def check_belongs(path: Path, written: str, run: str) -> None:
    """Check that a file belongs to the run with this hash, where both are known.

    Raises:
        IntegrityError: it belongs to another run.
    """
    if written and run and written != run:
        raise IntegrityError(
            f"{path}: belongs to another run ({written}; here is {run}): a file or folder was"
            " exchanged, or spec.toml changed"
        )
