"""Where do the numbers measured at each step go, and how are they read back?

Rows are collected in memory and sealed into small Parquet files, `segment-<first step>-<last
step>.parquet`, which pandas, polars and DuckDB read without Thalweg. Each appears whole or not at
all, so that a kill loses only the rows since the last seal. A segment's name says which steps it
holds, which makes merging and cutting safe without a list of files: while two files hold the same
steps, as after a kill, the one whose range covers the other's counts.

Each segment says which run it belongs to, which number it has, and the SHA-256 of the one before
it, in Parquet's own metadata: a segment that is missing, exchanged or of another run shows. Those
that a Thalweg before format 3 wrote say nothing of it; they can only come first.

Example:
    >>> import pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with MetricsWriter(pathlib.Path(folder), [Column("step", "integer"),
    ...                                               Column("loss", "float")]) as writer:
    ...         writer.log({"loss": 0.5}, 0)
    ...         writer.log({}, 1)
    ...     read_metrics(pathlib.Path(folder)).to_pydict()
    {'step': [0, 1], 'loss': [0.5, None]}
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from thalweg.errors import IntegrityError, InvalidInput, ThalwegError, invalid, unknown_name
from thalweg.lab.store import durable
from thalweg.lab.store.belonging import FORMAT, check_belongs, check_format
from thalweg.limits import check_limit

if TYPE_CHECKING:
    import pyarrow

#: A segment is sealed after this many rows or seconds, whichever comes first.
ROWS_PER_SEGMENT = 1000
SECONDS_PER_SEGMENT = 10.0
#: Beyond this many segments they are merged into one, so that a long run stays quick to read.
MAX_SEGMENTS = 64

_BYTES_OF_A_VALUE = 8
_READ_ATTEMPTS = 20
_MEND = "restore it from a copy, or: thalweg check STUDY --repair"
_NAME = re.compile(r"segment-(\d{8,})-(\d{8,})\.parquet")
_NAMES_KEY = b"thalweg:columns"
_PLACE_KEY = b"thalweg:place"

Kind = Literal["integer", "float", "vector"]


@dataclass(frozen=True)
class Column:
    """One column of the table: int64, float64, or a list of float64."""

    name: str
    kind: Kind = "float"


class MetricsWriter:
    """The sink of the lab: rows, one a step, as Parquet files in one folder.

    The columns are fixed from the first row on; steps only rise. Only the process that holds the
    run's lock may write: opening also removes what a killed writer left behind.

    Args:
        folder: the run's `metrics/`, created if missing.
        columns: all columns; one of them is `Column("step", "integer")`.
        run: hash of the run that the rows belong to; empty: none is written.

    Attributes:
        rows: how many rows the table has.
        last_step: of its last row; None without one.

    Raises:
        InvalidInput: no `step` column, a name twice, an unknown kind, or columns that differ from
            those already in the folder; a segment of a later format.
        IntegrityError: a segment in the folder is damaged, missing, or of another run.
    """

    def __init__(self, folder: Path, columns: Sequence[Column], run: str = "") -> None:
        _check_columns(columns)
        self.folder = Path(folder)
        self.columns = tuple(columns)
        self.run = run
        self._schema = _schema(columns)
        durable.make_folder(self.folder)
        remove_superseded(self.folder)
        pieces = read_pieces(list_segments(self.folder))
        check_chain(pieces, run)
        self._check_columns_of(pieces)
        self._stand_after(pieces)
        self._clear()

    def log(self, row: Mapping[str, Any], step: int) -> None:
        """Add the row of one step; a column that is not named was not measured there (null).

        Values may be Python numbers, or arrays and tensors of the column's kind; NaN and infinity
        are kept. The column `step` takes `step`, whether or not the row has it.

        Raises:
            InvalidInput: an unknown column, a value of the wrong kind, or a step that does not
                come after the last one.
        """
        if not self._buffer.keys() >= row.keys():
            unknown = next(name for name in row if name not in self._buffer)
            raise unknown_name("metrics column", unknown, self._buffer)
        named = {**row, "step": step}
        values = {column.name: _convert(column, named.get(column.name)) for column in self.columns}
        step = values["step"]
        if step is None or step < 0 or (self.last_step is not None and step <= self.last_step):
            raise invalid("metrics: step", step, f"an integer after the last, {self.last_step}")
        for name, value in values.items():
            self._buffer[name].append(value)
        self.last_step = step
        self.rows += 1
        self._waiting += 1
        if (
            self._waiting >= ROWS_PER_SEGMENT
            or time.monotonic() - self._buffering_since >= SECONDS_PER_SEGMENT
        ):
            self.flush()

    def flush(self) -> None:
        """Seal the rows so far: after this returns they survive a kill or a power cut.

        Raises:
            InvalidInput: the folder cannot be written to.
            DiskFull: the disk is full.
        """
        if self._waiting == 0:
            return
        import pyarrow

        table = pyarrow.table(self._buffer, schema=self._schema)
        place = Place(self.run, self._segment_count, self._digest)
        self._digest = write_segment(self.folder, table, place)
        self._clear()
        self._segment_count += 1
        if self._segment_count > MAX_SEGMENTS:
            self.compact()

    def truncate(self, from_step: int) -> None:
        """Drop all rows with step >= `from_step`: a resumed run measures them again.

        Killed halfway, the table holds a shorter or longer beginning of what it held, never a gap.
        """
        self.flush()
        segments = list_segments(self.folder)
        for number, segment in reversed(list(enumerate(segments))):
            if segment.last < from_step:
                break
            if segment.first < from_step:
                before = segments[number - 1].digest() if number else ""
                table = read_segment(segment)
                kept = bisect_left(table["step"].to_pylist(), from_step)
                # Until the removal below, the old segment covers this one: still one truth.
                place = Place(self.run, number, before)
                write_segment(self.folder, table.slice(0, kept), place)
            durable.remove(segment.path)
            durable.sync_folder(self.folder)
        self._stand_after(read_pieces(list_segments(self.folder)))

    def compact(self) -> None:
        """Merge all segments into one file; no row is lost or doubled if killed at any instant."""
        self.flush()
        segments = list_segments(self.folder)
        if len(segments) > 1:
            import pyarrow

            pieces = read_pieces(segments)
            check_chain(pieces, self.run)
            table = pyarrow.concat_tables(piece.table for piece in pieces)
            self._digest = write_segment(self.folder, table, Place(self.run))
            remove_superseded(self.folder)
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
        self._waiting = 0
        self._buffering_since = time.monotonic()

    def _stand_after(self, pieces: Sequence[Piece]) -> None:
        """Go on after these."""
        self.rows = sum(len(piece.table) for piece in pieces)
        self.last_step: int | None = pieces[-1].segment.last if pieces else None
        self._segment_count = len(pieces)
        self._digest = pieces[-1].digest if pieces else ""

    def _check_columns_of(self, pieces: Sequence[Piece]) -> None:
        if not pieces:
            return
        found = _kinds(pieces[-1].table.schema)
        wanted = _kinds(self._schema)
        if found != wanted:
            names = sorted({name for name, _ in found.items() ^ wanted.items()})
            raise InvalidInput(
                f"{self.folder}: its columns differ from this run's in {', '.join(names)}; "
                "columns are fixed from a run's first row on: use a new run folder"
            )


def read_metrics(folder: Path, run: str = "") -> pyarrow.Table:
    """Read a run's table, sorted by step, also while another process is writing it.

    Args:
        folder: the run's `metrics/`.
        run: hash of the run that it must belong to; empty: not checked.

    Returns:
        All sealed rows; before the first seal, a table without rows and with `step` alone.

    Raises:
        InvalidInput: a segment is of a later format.
        IntegrityError: a segment is damaged, missing, or of another run.
        ThalwegError: the writer merged or cut the table at every attempt to read it.
    """
    import pyarrow

    folder = Path(folder)
    for _ in range(_READ_ATTEMPTS):
        segments = list_segments(folder)
        try:
            pieces = read_pieces(segments)
        except FileNotFoundError:  # merged or cut by the writer since the folder was listed
            continue
        # Listing a folder is not one instant. If all that was read still counts, nothing was missed
        # in between: a segment goes only when another one covers it and its neighbours.
        after = list_segments(folder)
        if pieces and set(segments) <= set(after):
            check_chain(pieces, run)
            return pyarrow.concat_tables(piece.table for piece in pieces).combine_chunks()
        if not after:
            return pyarrow.table({"step": pyarrow.array([], pyarrow.int64())})
    raise ThalwegError(f"{folder}: its files changed at each of {_READ_ATTEMPTS} looks; read again")


def last_values(folder: Path, columns: Sequence[str], run: str = "") -> dict[str, float]:
    """Read the last measured value of columns of numbers, for looking at many runs at once.

    From the newest segment backwards until each has one, and these columns alone: `read_metrics`
    also checks what is before. A segment that is missing is seen by the number of those there are.

    Args:
        folder, run: as of `read_metrics`.
        columns: those that the table does not have are left out, like those never measured.

    Raises:
        InvalidInput: a segment is of a later format.
        IntegrityError: a segment that is read is damaged, or of another run; or one is missing.
        ThalwegError: the writer merged or cut the table at every attempt to read it.
    """
    folder = Path(folder)
    for _ in range(_READ_ATTEMPTS):
        try:
            return _last_values(list_segments(folder), columns, run)
        except FileNotFoundError:  # merged or cut by the writer since the folder was listed
            continue
    raise ThalwegError(f"{folder}: its files changed at each of {_READ_ATTEMPTS} looks; read again")


def _last_values(segments: Sequence[Segment], columns: Sequence[str], run: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for number, segment in reversed(list(enumerate(segments))):
        piece = read_piece(segment, [name for name in columns if name not in found])
        if piece.place is not None:
            check_belongs(segment.path, piece.place.run, run)
            if piece.place.number != number:
                # It may be the writer that is merging them.
                if not segment.path.exists():
                    raise FileNotFoundError(segment.path)
                raise IntegrityError(
                    f"{segment.path}: it is segment {piece.place.number} of its table, and {number}"
                    f" are before it; {_MEND}"
                )
        for name in piece.table.column_names:
            known = piece.table[name].drop_null()
            if len(known) and name not in found:
                found[name] = float(known[-1].as_py())
        if len(found) == len(columns):
            break
    return {name: found[name] for name in columns if name in found}


def _check_columns(columns: Sequence[Column]) -> None:
    names = [column.name for column in columns]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise invalid("metrics columns", doubled, "each name once")
    for name in names:
        durable.check_name("metrics column", name)
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


def _kinds(schema: pyarrow.Schema) -> dict[str, str]:
    """Return each column's kind; Parquet renames the field inside a list, which is no change."""
    return {field.name: str(field.type).partition("<")[0] for field in schema}


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


# The files that make up a table.


@dataclass(frozen=True, order=True)
class Segment:
    """One file, holding the rows of the steps `first` to `last`."""

    first: int
    last: int
    path: Path

    def covers(self, other: Segment) -> bool:
        """Return whether this one holds all that the other holds."""
        return self != other and self.first <= other.first and other.last <= self.last

    def digest(self) -> str:
        """SHA-256 of the file."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()


@dataclass(frozen=True)
class Place:
    """Where a segment belongs.

    Attributes:
        run: hash of the run; empty: not known.
        number: how many segments are before it.
        before: SHA-256 of the one before it; empty for the first.
    """

    run: str = ""
    number: int = 0
    before: str = ""


@dataclass(frozen=True)
class Piece:
    """What one segment holds; `place` is None where a former format says nothing of it."""

    segment: Segment
    table: pyarrow.Table
    place: Place | None
    digest: str


def check_chain(pieces: Sequence[Piece], run: str = "") -> None:
    """Check that these are all segments of a table from its first on, and of one run.

    Raises:
        IntegrityError: one is missing, exchanged, or of another run; its file is named.
    """
    before, marked = "", False
    for number, piece in enumerate(pieces):
        path, place = piece.segment.path, piece.place
        if place is None and marked:
            raise IntegrityError(f"{path}: is not of this table: it says no run; {_MEND}")
        if place is not None:
            check_belongs(path, place.run, run)
            if (place.number, place.before) != (number, before):
                raise IntegrityError(
                    f"{path}: it is segment {place.number} of its table, and what is before it is"
                    f" missing or was exchanged; {_MEND}"
                )
            marked = True
        before = piece.digest


def list_segments(folder: Path) -> list[Segment]:
    """Return the segments that count, by rising step: those that no other one covers."""
    found = _all_segments(folder)
    return sorted(s for s in found if not any(other.covers(s) for other in found))


def remove_superseded(folder: Path) -> None:
    """Remove the segments that do not count, and what a killed writer left half written."""
    durable.remove_unfinished(folder)
    for segment in set(_all_segments(folder)) - set(list_segments(folder)):
        durable.remove(segment.path)


def write_segment(folder: Path, table: pyarrow.Table, place: Place) -> str:
    """Write one or more rows, by rising step, as one durable file; return its SHA-256.

    Raises:
        InvalidInput: the folder cannot be written to.
        DiskFull: the disk is full.
    """
    import pyarrow
    from pyarrow import parquet

    said = json.dumps({"format": FORMAT, **asdict(place)})
    names = {_NAMES_KEY: " ".join(table.schema.names).encode(), _PLACE_KEY: said.encode()}
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
    content = sink.getvalue().to_pybytes()
    durable.write_file(folder / name, content)
    return hashlib.sha256(content).hexdigest()


def read_segment(segment: Segment) -> pyarrow.Table:
    """Read the rows of one segment; see `read_piece`."""
    return read_piece(segment).table


def read_pieces(segments: Sequence[Segment]) -> list[Piece]:
    """Read segments, each checked for itself; see `read_piece`."""
    return [read_piece(segment) for segment in segments]


def read_piece(segment: Segment, columns: Sequence[str] | None = None) -> Piece:
    """Read one segment with what it says of its place.

    Args:
        columns: those to read, as far as it has them, and `step`; None: all.

    Raises:
        FileNotFoundError: the writer has merged or cut it meanwhile.
        InvalidInput: it is of a later format.
        IntegrityError: it is not what was written.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        content = segment.path.read_bytes()
        source = pyarrow.BufferReader(content)
        opened = parquet.ParquetFile(source, page_checksum_verification=True)
        _check_claims(segment, opened.metadata)
        names = opened.schema_arrow.names
        wanted = names if columns is None else [n for n in names if n == "step" or n in columns]
        # A few columns are read sooner than threads are begun.
        table = opened.read(wanted, use_threads=columns is None)
        _check_footer(segment, table["step"], names, opened.schema_arrow.metadata)
        place = _place_of(segment, opened.schema_arrow.metadata)
    except (pyarrow.ArrowException, OSError, ValueError, LookupError, TypeError) as error:
        # A later format, not found, not allowed: not damaged.
        if isinstance(error, InvalidInput) or (isinstance(error, OSError) and error.errno):
            raise
        reason = str(error).partition("\n")[0]
        raise IntegrityError(f"{segment.path}: damaged ({reason}); {_MEND}") from error
    digest = hashlib.sha256(content).hexdigest()
    return Piece(segment, table.replace_schema_metadata(None), place, digest)


def count_rows(folder: Path, run: str = "") -> int:
    """Count the rows of a run's table by its footers alone.

    Raises:
        InvalidInput: a segment is of a later format.
        IntegrityError: a segment is damaged, or of another run.
    """
    import pyarrow
    from pyarrow import parquet

    count = 0
    for segment in list_segments(folder):
        try:
            with segment.path.open("rb") as file:
                footer = parquet.ParquetFile(file)
                count += footer.metadata.num_rows
                place = _place_of(segment, footer.schema_arrow.metadata)
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            if isinstance(error, InvalidInput) or (isinstance(error, OSError) and error.errno):
                raise
            raise IntegrityError(f"{segment.path}: damaged ({error}); {_MEND}") from error
        if place is not None:
            check_belongs(segment.path, place.run, run)
    return count


def _place_of(segment: Segment, metadata: Mapping[bytes, bytes] | None) -> Place | None:
    """What a segment says of its place; None before format 3."""
    said = (metadata or {}).get(_PLACE_KEY)
    if said is None:
        return None
    known = json.loads(said)
    if not isinstance(known, dict):
        raise ValueError("what it says of its place is no object")
    check_format(segment.path, known.pop("format", None))
    try:
        return Place(**known)
    except TypeError as error:
        raise ValueError("what it says of its place is not what was written") from error


def _check_claims(segment: Segment, metadata: Any) -> None:
    """Compare what a file claims with its name and the limit, before it is unpacked."""
    if not 0 < metadata.num_rows <= segment.last - segment.first + 1:
        raise ValueError(f"{metadata.num_rows:,} rows for the steps of its name")
    # Not what a column claims: pyarrow ends the process where that is damaged.
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    claimed = max(
        sum(group.total_byte_size for group in groups),
        _BYTES_OF_A_VALUE * metadata.num_rows * metadata.num_columns,
    )
    check_limit("table_bytes", claimed, segment.path, error=IntegrityError)


def _check_footer(
    segment: Segment,
    steps: pyarrow.ChunkedArray,
    names: Sequence[str],
    metadata: Mapping[bytes, bytes] | None,
) -> None:
    """Compare what Parquet's checksums leave out: the column names, and which steps there are."""
    written = (metadata or {}).get(_NAMES_KEY, b"")
    if written.decode(errors="replace").split() != names:
        raise ValueError("column names differ from those written")
    if (steps[0].as_py(), steps[-1].as_py()) != (segment.first, segment.last):
        raise ValueError("its steps are not those of its name")


def _all_segments(folder: Path) -> list[Segment]:
    if not folder.is_dir():
        return []
    matches = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return [Segment(int(match[1]), int(match[2]), path) for match, path in matches if match]
