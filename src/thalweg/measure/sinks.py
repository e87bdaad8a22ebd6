"""Where measured rows go: `watch(..., sinks=[...])` and the lab hand each row to every sink.

A sink has `log(row, step)` and `close()`. A row is a dict of numbers, lists of numbers and None for
what was not measured, and of a text where a report failed; `step` says at which step. Built in are
`Console`, `CSV`, `History`, and `thalweg.integrations.Parquet`; any function of (row, step) is a
sink as well. One of your own that is registered is known by its name:

Example:
    >>> from thalweg.registry import register, sinks
    >>> @register.sink("largest_loss")
    ... class LargestLoss:
    ...     value = 0.0
    ...     def log(self, row, step):
    ...         self.value = max(self.value, row["loss"])
    ...     def close(self):
    ...         print(f"the largest loss was {self.value}")
    >>> rows = Sinks(["largest_loss", lambda row, step: print(step, row)])
    >>> rows.log({"loss": 0.5}, step=10)
    10 {'loss': 0.5}
    >>> rows.close()
    the largest loss was 0.5
    >>> del sinks["largest_loss"]
"""

from __future__ import annotations

import contextlib
import csv
import inspect
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from thalweg import registry
from thalweg.errors import FULL_DISK, ThalwegError, invalid, without_controls
from thalweg.limits import read_bytes

Row = Mapping[str, Any]
"""Numbers, lists of numbers, text, or None where a column was not measured, by column."""

TEXT_COLUMNS = ("caveat", "failure")
"""The columns that hold text: why the subspace is not to be trusted, why a report failed."""


@runtime_checkable
class Sink(Protocol):
    """Takes the rows of a training, one after another, until it is closed."""

    def log(self, row: Row, step: int) -> None:
        """Take the row of a step; the row is the sink's own copy."""
        ...

    def close(self) -> None:
        """Write what is not written yet; no row follows."""
        ...


# Of an error's message in a warning and in a cell.
MOST_LETTERS = 300


class WatchWarning(UserWarning):
    """A report could not be made or written; the training continues."""


def warn(message: str) -> None:
    """Warn without stopping the training, also where the user has turned warnings into errors."""
    try:
        warnings.warn(message, WatchWarning, stacklevel=3)
    # The class, where it is turned into an error; any other, where what shows warnings fails.
    except Exception:
        say_if_possible(f"thalweg: {message}")


@contextlib.contextmanager
def warnings_that_stop_nothing() -> Iterator[None]:
    """Keep warnings of the block from ending it, where the user turned some into errors.

    They follow after the block; those that are errors then go to standard error, each text once.
    Where no warning is an error, nothing is touched: what Python remembers of warnings that were
    shown already belongs to the whole process.

    Example:
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("error")
        ...     with warnings_that_stop_nothing():
        ...         warnings.warn("no gap")
        ...         print("the block goes on")
        the block goes on
    """
    if not any(entry[0] == "error" for entry in warnings.filters):
        yield
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        finally:
            kept = list(caught or ())
    for each in kept:
        try:
            warnings.warn_explicit(
                each.message, each.category, each.filename, each.lineno, registry=_shown
            )
        except Exception:
            line = f"thalweg: {each.category.__name__}: {each.message}"
            if line not in _said:
                _said.add(line)
                say_if_possible(line)


_shown: dict[Any, Any] = {}
_said: set[str] = set()


def reason_of(error: BaseException) -> str:
    """What went wrong, on one line that is no longer than a cell should be."""
    try:
        text = " ".join(str(error).split())[:MOST_LETTERS]
    except Exception:  # a message that cannot be made
        text = ""
    if isinstance(error, ThalwegError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class Sinks:
    """Several sinks as one, whose failures stop nothing.

    A sink that fails is reported once, by a `WatchWarning`. It still gets the rows that follow: a
    full disk or a lost connection may recover.

    Args:
        given: sinks; names of registered ones, such as "console", with an argument behind a colon
            where they take one, such as "csv:rows.csv"; functions of (row, step).

    Attributes:
        sinks: those that take the rows, in the order given.

    Raises:
        InvalidInput: something that is no sink, an unknown name, a missing argument; whatever the
            constructor of a named sink refuses.
    """

    def __init__(self, given: Iterable[Sink | str | Callable[[Any, int], Any]]) -> None:
        if isinstance(given, str) or not isinstance(given, Iterable):
            raise invalid("sinks", given, "a list of sinks", f"[{given!r}] for one alone")
        self.sinks = [_as_sink(sink) for sink in given]
        self._failed: set[int] = set()

    def log(self, row: Row, step: int) -> None:
        """Hand a copy of the row to each sink."""
        for sink in self.sinks:
            try:
                sink.log(dict(row), step)
            except Exception as error:
                self._report(sink, f"step {step} could not be written", error)

    def close(self) -> None:
        """Close each sink once; to close twice does nothing."""
        while self.sinks:
            sink = self.sinks.pop(0)
            try:
                sink.close()
            except Exception as error:
                self._report(sink, "could not be closed", error)

    def _report(self, sink: Sink, what: str, error: Exception) -> None:
        if id(sink) not in self._failed:
            self._failed.add(id(sink))
            warn(
                f"{_name(sink)}: {what} ({reason_of(error)}{_mend_of(sink, error)}); the training"
                " continues, and further failures of this sink are not reported"
            )


def _mend_of(sink: Sink, error: Exception) -> str:
    """Which file it is, what is kept, what to do, where a disk is full."""
    path = getattr(sink, "path", None)
    if not (isinstance(error, OSError) and error.errno in FULL_DISK and path is not None):
        return ""
    return f": {path} keeps its earlier rows, and gets the others once there is room: make some"


class History:
    """Keeps the rows in memory.

    Attributes:
        rows: one dict a row, with its step; `pandas.DataFrame(history.rows)`.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def log(self, row: Row, step: int) -> None:
        """Keep a row."""
        self.rows.append({"step": step, **row})

    def close(self) -> None:
        """Nothing: the rows stay."""


@registry.sinks.register("csv")
class CSV:
    """Writes rows into a CSV file, which is complete after each row.

    The header is fixed: a column that a row lacks stays empty, one that the header lacks is left
    out, with a `WatchWarning`. Lists are written as "[0.5, 0.25]".

    Args:
        path: the file; its folder must exist.
        columns: the header, beginning with "step"; None for the keys of the first row.
        overwrite: replace a file that is there.
        resume_at: continue a file that is there: its rows of earlier steps stay; later ones are
            dropped, since they are about to be made again, and so is a last line that a kill or a
            power cut left torn.

    A row that the disk has no room for is kept in memory, and written with the next one.

    Raises:
        InvalidInput: the file is there and neither was asked for; it has other columns; it is a
            folder, or its folder does not exist.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "rows.csv"
        >>> CSV(path).log({"loss": 0.5}, step=0)
        >>> path.read_text().split()
        ['step,loss', '0,0.5']
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        columns: Sequence[str] | None = None,
        *,
        overwrite: bool = False,
        resume_at: int | None = None,
    ) -> None:
        if not isinstance(path, str | os.PathLike):
            raise invalid("file", path, "a path")
        self.path = Path(path)
        self.columns = None if columns is None else tuple(columns)
        self._left_out: set[str] = set()
        self._unwritten = ""
        kept: list[list[str]] = []
        if not self.path.parent.is_dir():
            raise invalid("file", str(self.path), "a path in a folder that exists")
        if self.path.is_dir():
            raise invalid("file", str(self.path), "the path of a file", "this is a folder")
        if self.path.exists() and resume_at is not None:
            kept = self._rows_before(resume_at)
        elif self.path.exists() and not overwrite:
            raise invalid(
                "file",
                str(self.path),
                "one that is not there yet",
                "pass overwrite=True, or resume_at=step to continue it",
            )
        if self.columns is not None:
            self._begin(kept)

    def log(self, row: Row, step: int) -> None:
        """Add a row.

        Raises:
            OSError: the disk is full, or the file cannot be written.
        """
        row = {"step": step, **row}
        if self.columns is None:
            self.columns = tuple(row)
            self._begin([])
        self._unwritten += _line([row.get(column) for column in self.columns])
        self._write()
        if new := row.keys() - self._left_out - set(self.columns):
            self._left_out |= new
            warn(f"{self.path}: {', '.join(sorted(new))} not in its header; give `columns`")

    def close(self) -> None:
        """Write what had no room before; usually nothing, for every row is on disk already.

        Raises:
            OSError: there is none still.
        """
        self._write()

    def _write(self) -> None:
        if not self._unwritten:
            return
        # Opened for each row: nothing is left open or unwritten if the training dies.
        size = self.path.stat().st_size
        try:
            with self.path.open("a", encoding="utf-8", newline="") as file:
                file.write(self._unwritten)
        except OSError:
            # A full disk may have taken half of the line, which the next row would be joined to.
            with contextlib.suppress(OSError):
                os.truncate(self.path, size)
            raise
        self._unwritten = ""

    def _begin(self, rows: list[list[str]]) -> None:
        assert self.columns is not None
        text = _line(self.columns) + "".join(map(_line, rows))
        with replacing(self.path) as beside:
            beside.write_text(text, encoding="utf-8", newline="")

    def _rows_before(self, step: int) -> list[list[str]]:
        try:
            content = read_bytes(self.path, "table_bytes")
            # A power cut may leave zeros; what follows the last line break was cut short.
            content = content.partition(b"\0")[0]
            rows = _whole_rows(content[: content.rfind(b"\n") + 1].decode("utf-8"))
        except (UnicodeDecodeError, csv.Error) as error:
            allowed = "a CSV file in UTF-8"
            raise invalid("file", str(self.path), allowed, "give another file") from error
        found = tuple(rows[0]) if rows else ()
        self.columns = self.columns or (found if found[:1] == ("step",) else None)
        columns = self.columns or ()
        # Until 0.1 no row said why a report failed, or why a subspace is not to be trusted.
        known = tuple(c for c in columns if c in found or c not in TEXT_COLUMNS)
        if not rows or found != known:
            given = ",".join(found) or "an empty file"
            allowed = ",".join(self.columns or ("step", "..."))
            raise invalid(f"columns of {self.path}", given, allowed, "give another file")
        whole = [row for row in rows[1:] if len(row) == len(found) and row[0].isdecimal()]
        cells = [dict(zip(found, row, strict=True)) for row in whole if int(row[0]) < step]
        return [[row.get(column, "") for column in columns] for row in cells]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` that takes its place in the end; the old one is whole until then."""
    beside = path.with_name(path.name + ".part")
    try:
        yield beside
        beside.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise


CONSOLE_COLUMNS = {
    "step": ("step", "{:d}", 8),
    "loss": ("loss", "{:.4g}", 11),
    "sharpness": ("sharpness", "{:.4g}", 11),
    "preconditioned_sharpness": ("in metric", "{:.4g}", 11),
    "stability_threshold": ("threshold", "{:.4g}", 11),
    "stability_margin": ("margin", "{:.1%}", 9),
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

HEADING_EVERY = 20


@registry.sinks.register("console")
class Console:
    """Prints an aligned line for each row on standard error, and headings every 20 lines.

    A row that leaves most of the columns empty, as a quick row of `watch` does, is passed over.

    Args:
        columns: those shown, of `CONSOLE_COLUMNS`; None for those that the first row has.
    """

    def __init__(self, columns: Sequence[str] | None = None) -> None:
        self.columns = None if columns is None else tuple(columns)
        self._lines = 0

    def log(self, row: Row, step: int) -> None:
        """Print a row."""
        row = {"step": step, **row}
        if self.columns is None:
            if row.get("failure") is not None:
                # It does not tell what the rows that follow have.
                say(f"{step:>8d}  {row['failure']}")
                return
            self.columns = tuple(name for name in CONSOLE_COLUMNS if row.get(name) is not None)
        filled = sum(row.get(name) is not None for name in self.columns)
        if 2 * filled < len(self.columns) and row.get("failure") is None:
            return
        if self._lines % HEADING_EVERY == 0:
            say(console_heading(self.columns))
        self._lines += 1
        caveat = row.get("caveat")
        say(console_line(self.columns, row) + (f"  {caveat}" if caveat else ""))

    def close(self) -> None:
        """Nothing."""


def console_heading(columns: Sequence[str]) -> str:
    """The headings of `columns`, aligned with `console_line`."""
    return "".join(
        f"{CONSOLE_COLUMNS[column][0]:>{CONSOLE_COLUMNS[column][2]}}" for column in columns
    )


def console_line(columns: Sequence[str], row: Row) -> str:
    """A row on one line; "-" for what is not known."""
    cells: list[str] = []
    for column in columns:
        _, form, width = CONSOLE_COLUMNS[column]
        value = row.get(column)
        cells.append(f"{'-' if value is None else form.format(value):>{width}}")
    return "".join(cells)


def say(line: str) -> None:
    """Write a line on standard error: results alone go to standard output."""
    sys.stderr.write(without_controls(line) + "\n")


def say_if_possible(line: str) -> None:
    """Say it where there is a standard error: it may be closed, or None without a console."""
    with contextlib.suppress(Exception):
        say(line)


class _Function:
    """A function of (row, step) as a sink."""

    def __init__(self, function: Callable[[Any, int], Any]) -> None:
        self.function = function

    def log(self, row: Row, step: int) -> None:
        self.function(row, step)

    def close(self) -> None:
        pass


def _as_sink(given: Any) -> Sink:
    if isinstance(given, str):
        return _named(given)
    if isinstance(given, Sink) and not isinstance(given, type):
        return given
    if callable(given) and not isinstance(given, type):
        return _Function(given)
    name = given.__name__ if isinstance(given, type) else type(given).__name__
    allowed = "objects with log(row, step) and close(), functions of (row, step), names"
    raise invalid("sinks", name, allowed, f"{name}(...)" if isinstance(given, type) else "")


def _named(given: str) -> Sink:
    """The sink of "name" or "name:argument"."""
    name, _, argument = given.partition(":")
    entry = registry.sinks.find(name)
    arguments = [argument] if argument else []
    signature = inspect.signature(entry)
    if _fits(signature, arguments):
        return _as_sink(entry(*arguments))
    if not (arguments or isinstance(entry, type)) and _fits(signature, [{}, 0]):
        return _Function(entry)  # a function of (row, step) was registered
    wanted = f"'{name}'" if arguments else f"'{name}:{next(iter(signature.parameters))}'"
    raise invalid("sinks", given, wanted)


def _fits(signature: inspect.Signature, arguments: list[Any]) -> bool:
    try:
        signature.bind(*arguments)
    except TypeError:
        return False
    return True


def _name(sink: Sink) -> str:
    if isinstance(sink, _Function):
        return str(getattr(sink.function, "__qualname__", sink.function))
    return type(sink).__qualname__


def _whole_rows(text: str) -> list[list[str]]:
    """The rows of a CSV text; without a last one whose quotation is not closed.

    Raises:
        csv.Error: a row before it is none.
    """
    rows: list[list[str]] = []
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            rows.append(row)
    except csv.Error:
        if reader.line_num < text.count("\n"):
            raise
    return rows


def _line(values: Sequence[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue()
