"""Is a run what its folder says? Its status, checkpoints and metrics against one another.

    runs/<study>/seed-0/sgd/status.json says done    its last checkpoint must say so, and be its own
                            metrics/                 must hold the rows that were measured

`check_done` looks at manifests and footers alone, so that it costs nothing to ask before each
resume; `verify_run` reads every byte.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thalweg.errors import IntegrityError, InvalidInput
from thalweg.lab.store.belonging import Mark, check_belongs, check_format
from thalweg.lab.store.checkpoint import list_checkpoints, read_mark, verify_checkpoint
from thalweg.lab.store.folders import RunFolder
from thalweg.lab.store.metrics import Piece, check_chain, count_rows, list_segments, read_piece
from thalweg.lab.store.status import Status
from thalweg.lab.tables import parse_toml

MEND = "to go back to its newest good state: thalweg check STUDY --repair"


def read_run_table(run: RunFolder) -> dict[str, Any]:
    """Return what `run.toml` holds.

    Raises:
        InvalidInput: it is of a later format.
        IntegrityError: it is missing, damaged, or another run's.
    """
    path = run.path / "run.toml"
    try:
        text = run.run_text
    except InvalidInput as error:
        raise IntegrityError(f"{path}: is missing; {MEND}") from error
    try:
        table = parse_toml(text, str(path))
    except ValueError as error:
        raise IntegrityError(f"{path}: damaged, no TOML ({error}); {MEND}") from error
    if "format" in table:
        check_format(path, table["format"])
    if not {"seed", "branch"} <= table.keys():
        raise IntegrityError(f"{path}: damaged, it does not say of which run it is; {MEND}")
    run.require_own_place(table)
    return table


def check_done(run: RunFolder, status: Status, identity: str) -> Mark:
    """Check that a run is done as its status says, by manifests and footers; return its mark.

    Args:
        run: its folder.
        status: its status, which says "done".
        identity: hash of the run; empty: not known.

    Raises:
        InvalidInput: a file is of a later format.
        IntegrityError: it is not done, or a file is missing or of another run; the file is named.
    """
    path = run.path / "status.json"
    check_belongs(path, status.run_hash, identity)
    known = list_checkpoints(run.checkpoints)
    if not known:
        raise IntegrityError(f"{path}: says done, but there is no checkpoint; {MEND}")
    mark = read_mark(known[-1])
    check_belongs(known[-1], mark.run, identity)
    if not mark.finished:
        raise IntegrityError(
            f"{path}: says done, but the last checkpoint, {known[-1].name}, is not at the end of"
            f" the run; {MEND}"
        )
    rows = count_rows(run.metrics, identity)
    if status.rows is not None and rows != status.rows:
        raise IntegrityError(
            f"{run.metrics}: {rows} of {status.rows} measured rows are there; {MEND}"
        )
    return mark


@dataclass(frozen=True)
class Verified:
    """What of a run is good.

    Attributes:
        run: hash of the run; empty: not known.
        marks: its good checkpoints, with what they say.
        pieces: its good segments of metrics, from the first on.
        is_marked: whether all its files say which run they belong to.
    """

    run: str
    marks: dict[Path, Mark]
    pieces: list[Piece]
    is_marked: bool

    def rows_before(self, step: int) -> int:
        """How many rows are there of steps before this one."""
        steps = [s for piece in self.pieces for s in piece.table["step"].to_pylist()]
        return sum(s < step for s in steps)


def verify_run(run: RunFolder, identity: str, say: Callable[[Path, object], None]) -> Verified:
    """Verify every file of a run that no process is at work on.

    Args:
        run: its folder.
        identity: hash of the run; empty: not known.
        say: takes each finding: the file, and what is wrong with it.

    Raises:
        InvalidInput: a file is of a later format.
    """
    marks = _verify_checkpoints(run, identity, say)
    pieces = _verify_metrics(run, identity, say)
    status = _verify_status(run, identity, say)
    carry = [bool(mark.run) for mark in marks.values()]
    carry += [piece.place is not None and bool(piece.place.run) for piece in pieces]
    carry += [bool(status.run_hash)] if status else []
    verified = Verified(identity, marks, pieces, all(carry) and (bool(identity) or not carry))
    for path, mark in marks.items():
        there = verified.rows_before(step_of(path))
        if mark.rows is not None and there != mark.rows:
            what = f"{there} of the {mark.rows} rows before {path.name} are there"
            say(run.metrics, f"{run.metrics}: {what}")
    return verified


def _verify_status(
    run: RunFolder, identity: str, say: Callable[[Path, object], None]
) -> Status | None:
    path = run.path / "status.json"
    try:
        status = run.status()
        if status is not None:
            check_belongs(path, status.run_hash, identity)
            if status.state == "done":
                check_done(run, status, identity)
    except IntegrityError as error:
        say(path, error)
        return None
    return status


def _verify_checkpoints(
    run: RunFolder, identity: str, say: Callable[[Path, object], None]
) -> dict[Path, Mark]:
    marks: dict[Path, Mark] = {}
    for path in list_checkpoints(run.checkpoints):
        try:
            marks[path] = verify_checkpoint(path, identity)
        except IntegrityError as error:
            say(path, error)
    return marks


def _verify_metrics(
    run: RunFolder, identity: str, say: Callable[[Path, object], None]
) -> list[Piece]:
    """Return the good segments from the first on."""
    pieces: list[Piece] = []
    for segment in list_segments(run.metrics):
        try:
            piece = read_piece(segment)
            check_chain([*pieces, piece], identity)
        except IntegrityError as error:
            say(segment.path, error)
            break
        pieces.append(piece)
    return pieces


def step_of(path: Path) -> int:
    """The step of a checkpoint, by its name."""
    return int(path.name.rpartition("-")[2])
