"""Where the rows of a watched training go: a CSV file, and one aligned line each on the console.

A file is complete after every row, and never overwritten unless that is asked for. Its columns are
fixed from the start: what is not known at a step is empty.

Example:
    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "rows.csv"
    >>> RowFile(path, ("step", "loss")).append({"step": 0, "loss": 0.5})
    >>> path.read_text().split()
    ['step,loss', '0,0.5']
"""

from __future__ import annotations

import csv
import io
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from thalweg.errors import invalid


class RowFile:
    """A CSV file with a fixed header, a row at a time, on disk after each.

    Args:
        path: the file; its folder must exist.
        columns: the header; the first is "step".
        overwrite: replace a file that is there.
        resume_at: go on with a file that is there: its rows of earlier steps stay, later ones and a
            last line cut short are dropped, since they are about to be made again.

    Raises:
        InvalidInput: the file is there and neither was asked for; its header is another one; the
            folder is not there.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        columns: Sequence[str],
        *,
        overwrite: bool = False,
        resume_at: int | None = None,
    ) -> None:
        self.path = Path(path)
        self.columns = tuple(columns)
        if not self.path.parent.is_dir():
            raise invalid("file", str(self.path), "a path in a folder that exists")
        kept: list[list[str]] = []
        if self.path.exists() and resume_at is not None:
            kept = self._rows_before(resume_at)
        elif self.path.exists() and not overwrite:
            raise invalid(
                "file",
                str(self.path),
                "one that is not there yet",
                "pass overwrite=True, or resume_at=step to go on with it",
            )
        # The old file is whole until the new one takes its place.
        beside = self.path.with_name(self.path.name + ".part")
        beside.write_text(_line(self.columns) + "".join(map(_line, kept)), encoding="utf-8")
        beside.replace(self.path)

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row; columns that it lacks stay empty.

        Raises:
            OSError: the disk is full, or the file cannot be written.
        """
        # Opened for each row: nothing is left open or unwritten if the training dies.
        with self.path.open("a", encoding="utf-8", newline="") as file:
            file.write(_line([row.get(column) for column in self.columns]))

    def _rows_before(self, step: int) -> list[list[str]]:
        text = self.path.read_text(encoding="utf-8")
        # What follows the last line break was cut short.
        rows = list(csv.reader(text[: text.rfind("\n") + 1].splitlines()))
        if not rows or tuple(rows[0]) != self.columns:
            given = ",".join(rows[0]) if rows else "an empty file"
            raise invalid(
                f"columns of {self.path}", given, ",".join(self.columns), "give another file"
            )
        whole = [row for row in rows[1:] if len(row) == len(self.columns)]
        return [row for row in whole if int(row[0]) < step]


CONSOLE_COLUMNS = {
    "step": ("step", "{:d}", 8),
    "loss": ("loss", "{:.4g}", 11),
    "sharpness": ("sharpness", "{:.4g}", 11),
    "preconditioned_sharpness": ("in metric", "{:.4g}", 11),
    "stability_threshold": ("threshold", "{:.4g}", 11),
    "lr_sharpness": ("lr*lam_1", "{:.3g}", 11),
    "alignment_gradient": ("chi(g)", "{:.3f}", 7),
    "alignment_minibatch": ("chi(g_B)", "{:.3f}", 9),
    "alignment_update": ("chi(upd)", "{:.3f}", 9),
    "effective_lr_dominant": ("lr dom", "{:.3g}", 11),
    "effective_lr_bulk": ("lr bulk", "{:.3g}", 11),
    "subspace_error": ("error", "{:.1%}", 7),
    "subspace_gradients": ("cost", "{:.1f}", 6),
}
"""What the console shows of a row: its heading there, format and width."""


def console_heading(columns: Sequence[str]) -> str:
    """The headings of `columns`, aligned with `console_line`."""
    return "".join(
        f"{CONSOLE_COLUMNS[column][0]:>{CONSOLE_COLUMNS[column][2]}}" for column in columns
    )


def console_line(columns: Sequence[str], row: Mapping[str, Any]) -> str:
    """A row on one line; "-" for what is not known."""
    cells: list[str] = []
    for column in columns:
        _, form, width = CONSOLE_COLUMNS[column]
        value = row.get(column)
        cells.append(f"{'-' if value is None else form.format(value):>{width}}")
    return "".join(cells)


def say(line: str) -> None:
    """Write a line where people read: results alone go to standard output."""
    sys.stderr.write(line + "\n")


def _line(values: Sequence[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue()
