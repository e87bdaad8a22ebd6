"""Where do the numbers measured at each step go, and how are they read back?

Rows are collected in memory and sealed into small Parquet files, `segment-<first step>-<last
step>.parquet`, which pandas, polars and DuckDB read without Thalweg. Each appears whole or not at
all, so that a kill loses only the rows since the last seal.

A segment's name says which steps it holds. That makes merging and cutting safe without a list
of files: while two files hold the same steps, the one whose range covers the other's counts.

Example:
    >>> import pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with MetricsWriter(pathlib.Path(folder), [Column("step", "integer"),
    ...                                               Column("loss", "float")]) as writer:
    ...         writer.append({"step": 0, "loss": 0.5})
    ...         writer.append({"step": 1})
    ...     read_metrics(pathlib.Path(folder)).to_pydict()
    {'step': [0, 1], 'loss': [0.5, None]}
"""

from __future__ import annotations

import re
import time
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from thalweg.errors import IntegrityError, InvalidInput, invalid, unknown_name
from thalweg.lab import durable

if TYPE_CHECKING:
    import pyarrow

#: A segment is sealed after this many rows or seconds, whichever comes first.
ROWS_PER_SEGMENT = 1000
SECONDS_PER_SEGMENT = 10.0
#: Beyond this many segments they are merged into one, so that a long run stays quick to read.
MAX_SEGMENTS = 64

_SEGMENT = re.compile(r"segment-(\d{8,})-(\d{8,})\.parquet")
_READ_ATTEMPTS = 20

Kind = Literal["integer", "float", "vector"]


@dataclass(frozen=True)
class Column:
    """One column of the table: int64, float64, or a list of float64."""

    name: str
    kind: Kind = "float"


@dataclass(frozen=True, order=True)
class _Segment:
    first: int
    last: int
    path: Path

    def covers(self, other: _Segment) -> bool:
        return self != other and self.first <= other.first and other.last <= self.last


class MetricsWriter:
    """Appends rows, one a step, to the table in one folder.

    The columns are fixed from the first row on; steps only rise. Only the process that holds the
    run's lock may write: opening also removes what a killed writer left behind.

    Args:
        folder: the run's `metrics/`, created if missing.
        columns: all columns; one of them is `Column("step", "integer")`.

    Raises:
        InvalidInput: no `step` column, a name twice, an unknown kind, or columns that differ from
            those already in the folder.
        IntegrityError: a segment in the folder is damaged.
    """

    def __init__(self, folder: Path, columns: Sequence[Column]) -> None:
        _check_columns(columns)
        self.folder = Path(folder)
        self.columns = tuple(columns)
        self._schema = _schema(columns)
        durable.make_folder(self.folder)
        _remove_superseded(self.folder)
        self._check_existing_columns()
        segments = _segments(self.folder)
        self.last_step: int | None = segments[-1].last if segments else None
        self._segment_count = len(segments)
        self._clear()

    def append(self, row: Mapping[str, Any]) -> None:
        """Add the row of one step; a column that is not named was not measured there (null).

        Values may be Python numbers, or arrays and tensors of the column's kind; NaN and infinity
        are kept.

        Raises:
            InvalidInput: an unknown column, a value of the wrong kind, or a step that does not
                come after the last one.
        """
        if not self._buffer.keys() >= row.keys():
            unknown = next(name for name in row if name not in self._buffer)
            raise unknown_name("metrics column", unknown, self._buffer)
        values = {c.name: _convert(c, row.get(c.name)) for c in self.columns}
        step = values["step"]
        if step is None or step < 0 or (self.last_step is not None and step <= self.last_step):
            raise invalid("metrics: step", step, f"an integer after the last, {self.last_step}")
        for name, value in values.items():
            self._buffer[name].append(value)
        self.last_step = step
        self._rows += 1
        if (
            self._rows >= ROWS_PER_SEGMENT
            or time.monotonic() - self._buffering_since >= SECONDS_PER_SEGMENT
        ):
            self.flush()

    def flush(self) -> None:
        """Seal the rows so far: after this returns they survive a kill or a power cut.

        Raises:
            InvalidInput: the folder cannot be written to.
            ThalwegError: the disk is full.
        """
        if self._rows == 0:
            return
        import pyarrow

        self._write(pyarrow.table(self._buffer, schema=self._schema))
        self._clear()
        self._segment_count += 1
        if self._segment_count > MAX_SEGMENTS:
            self.compact()

    def truncate(self, from_step: int) -> None:
        """Drop all rows with step >= `from_step`: a resumed run measures them again.

        Killed halfway, the table holds a shorter or longer beginning of what it held, never a gap.
        """
        self.flush()
        for segment in reversed(_segments(self.folder)):
            if segment.last < from_step:
                break
            if segment.first < from_step:
                table = _read_segment(segment.path)
                kept = bisect_left(table["step"].to_pylist(), from_step)
                # Until the removal below, the old segment covers this one: still one truth.
                self._write(table.slice(0, kept))
            durable.remove(segment.path)
            durable.sync_folder(self.folder)
        segments = _segments(self.folder)
        self._segment_count = len(segments)
        self.last_step = segments[-1].last if segments else None

    def compact(self) -> None:
        """Merge all segments into one file; no row is lost or doubled if killed at any instant."""
        self.flush()
        segments = _segments(self.folder)
        if len(segments) > 1:
            import pyarrow

            self._write(pyarrow.concat_tables(_read_segment(s.path) for s in segments))
            _remove_superseded(self.folder)
        self._segment_count = min(len(segments), 1)

    def close(self) -> None:
        """Seal what is left."""
        self.flush()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _clear(self) -> None:
        self._buffer: dict[str, list[Any]] = {column.name: [] for column in self.columns}
        self._rows = 0
        self._buffering_since = time.monotonic()

    def _write(self, table: pyarrow.Table) -> None:
        import pyarrow
        from pyarrow import parquet

        # Serialized in memory first: `parquet.write_table(path)` deletes the target when it fails.
        sink = pyarrow.BufferOutputStream()
        parquet.write_table(
            table, sink, compression="zstd", use_dictionary=False, write_page_checksum=True
        )
        steps = table["step"]
        name = f"segment-{steps[0].as_py():08d}-{steps[-1].as_py():08d}.parquet"
        durable.write_file(self.folder / name, sink.getvalue().to_pybytes())

    def _check_existing_columns(self) -> None:
        segments = _segments(self.folder)
        if not segments:
            return
        found = set(_read_segment(segments[-1].path).schema)
        wanted = set(self._schema)
        if found != wanted:
            names = sorted({field.name for field in found ^ wanted})
            raise InvalidInput(
                f"{self.folder}: its columns differ from this run's in {', '.join(names)}; "
                "columns are fixed from a run's first row on: use a new run folder"
            )


def read_metrics(folder: Path) -> pyarrow.Table:
    """Read a run's table, sorted by step, also while another process is writing it.

    Returns:
        All sealed rows; before the first seal, a table without rows and with `step` alone.

    Raises:
        IntegrityError: a segment is damaged.
    """
    import pyarrow

    folder = Path(folder)
    tables: list[pyarrow.Table] = []
    for _ in range(_READ_ATTEMPTS):
        segments = _segments(folder)
        try:
            tables = [_read_segment(segment.path) for segment in segments]
        except FileNotFoundError:  # merged or cut by the writer since the folder was listed
            continue
        # Listing a folder is not one instant: the same list twice means that nothing was missed.
        if _segments(folder) == segments:
            break
    if not tables:
        return pyarrow.table({"step": pyarrow.array([], pyarrow.int64())})
    return pyarrow.concat_tables(tables).combine_chunks()


def _segments(folder: Path) -> list[_Segment]:
    """Return the segments that count, by rising step: those that no other one covers."""
    found = _all_segments(folder)
    return sorted(s for s in found if not any(other.covers(s) for other in found))


def _all_segments(folder: Path) -> list[_Segment]:
    if not folder.is_dir():
        return []
    matches = ((_SEGMENT.fullmatch(path.name), path) for path in folder.iterdir())
    return [_Segment(int(match[1]), int(match[2]), path) for match, path in matches if match]


def _remove_superseded(folder: Path) -> None:
    durable.remove_unfinished(folder)
    for segment in set(_all_segments(folder)) - set(_segments(folder)):
        durable.remove(segment.path)


def _read_segment(path: Path) -> pyarrow.Table:
    import pyarrow
    from pyarrow import parquet

    try:
        with path.open("rb") as file:
            return parquet.ParquetFile(file, page_checksum_verification=True).read()
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # not found, not allowed: not damaged
            raise
        raise IntegrityError(
            f"{path}: damaged ({str(error).splitlines()[0]}); restore it from a copy, or remove it "
            "and resume from a checkpoint before its first step"
        ) from error


def _check_columns(columns: Sequence[Column]) -> None:
    names = [column.name for column in columns]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise invalid("metrics columns", doubled, "each name once")
    if Column("step", "integer") not in columns:
        raise invalid("metrics columns", names, "a list with Column('step', 'integer')")
    for column in columns:
        if column.kind not in ("integer", "float", "vector"):
            raise unknown_name(
                f"kind of column {column.name}", column.kind, ("integer", "float", "vector")
            )


def _schema(columns: Sequence[Column]) -> pyarrow.Schema:
    import pyarrow

    types = {
        "integer": pyarrow.int64(),
        "float": pyarrow.float64(),
        "vector": pyarrow.list_(pyarrow.float64()),
    }
    return pyarrow.schema([(column.name, types[column.kind]) for column in columns])


def _convert(column: Column, value: Any) -> Any:
    if value is None:
        return None
    try:
        if column.kind == "float":
            return float(value)
        if column.kind == "integer":
            if int(value) != value:
                raise ValueError
            return int(value)
        return [float(item) for item in (value.tolist() if hasattr(value, "tolist") else value)]
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        allowed = {"float": "a number", "integer": "an integer", "vector": "a list of numbers"}
        raise invalid(f"metrics column {column.name}", value, allowed[column.kind]) from error
