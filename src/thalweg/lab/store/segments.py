"""Which files of a folder make up a run's table, and is each what was written?

A segment's name, `segment-<first step>-<last step>.parquet`, says which steps it holds. That makes
merging and cutting safe without a list of files: while two files hold the same steps, as after a
kill, the one whose range covers the other's counts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from thalweg.errors import IntegrityError
from thalweg.lab.store import durable

if TYPE_CHECKING:
    import pyarrow

_NAME = re.compile(r"segment-(\d{8,})-(\d{8,})\.parquet")
_NAMES_KEY = b"thalweg:columns"


@dataclass(frozen=True, order=True)
class Segment:
    """One file, holding the rows of the steps `first` to `last`."""

    first: int
    last: int
    path: Path

    def covers(self, other: Segment) -> bool:
        """Return whether this one holds all that the other holds."""
        return self != other and self.first <= other.first and other.last <= self.last


def list_segments(folder: Path) -> list[Segment]:
    """Return the segments that count, by rising step: those that no other one covers."""
    found = _all_segments(folder)
    return sorted(s for s in found if not any(other.covers(s) for other in found))


def remove_superseded(folder: Path) -> None:
    """Remove the segments that do not count, and what a killed writer left half written."""
    durable.remove_unfinished(folder)
    for segment in set(_all_segments(folder)) - set(list_segments(folder)):
        durable.remove(segment.path)


def write_segment(folder: Path, table: pyarrow.Table) -> None:
    """Write one or more rows, by rising step, as one durable file.

    Raises:
        InvalidInput: the folder cannot be written to.
        ThalwegError: the disk is full.
    """
    import pyarrow
    from pyarrow import parquet

    names = {_NAMES_KEY: " ".join(table.schema.names).encode()}
    # Serialized in memory first: `parquet.write_table(path)` deletes the target when it fails.
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(
        table.replace_schema_metadata(names),
        sink,
        compression="zstd",
        use_dictionary=False,
        write_page_checksum=True,
    )
    steps = table["step"]
    name = f"segment-{steps[0].as_py():08d}-{steps[-1].as_py():08d}.parquet"
    durable.write_file(folder / name, sink.getvalue().to_pybytes())


def read_segment(segment: Segment) -> pyarrow.Table:
    """Read one segment.

    Raises:
        FileNotFoundError: the writer has merged or cut it meanwhile.
        IntegrityError: it is not what was written.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        with segment.path.open("rb") as file:
            table = parquet.ParquetFile(file, page_checksum_verification=True).read()
        _check_footer(segment, table)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno:  # not found, not allowed: not damaged
            raise
        raise IntegrityError(
            f"{segment.path}: damaged ({str(error).splitlines()[0]}); restore it from a copy, or "
            "remove it and resume from a checkpoint before its first step"
        ) from error
    return table.replace_schema_metadata(None)


def _check_footer(segment: Segment, table: pyarrow.Table) -> None:
    """Compare what Parquet's checksums leave out: the column names, and which steps there are."""
    written = (table.schema.metadata or {}).get(_NAMES_KEY, b"")
    if written.decode(errors="replace").split() != table.schema.names:
        raise ValueError("column names differ from those written")
    steps = table["step"]
    if (steps[0].as_py(), steps[-1].as_py()) != (segment.first, segment.last):
        raise ValueError("its steps are not those of its name")


def _all_segments(folder: Path) -> list[Segment]:
    if not folder.is_dir():
        return []
    matches = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return [Segment(int(match[1]), int(match[2]), path) for match, path in matches if match]
