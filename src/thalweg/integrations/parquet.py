"""Measured rows in a Parquet file, which pandas, polars and DuckDB read.

Example:
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "rows.parquet"
    >>> rows = Parquet(path)
    >>> rows.log({"loss": 0.5, "eigenvalues": [2.0, 1.0]}, step=0)
    >>> rows.close()
    >>> import pyarrow.parquet
    >>> pyarrow.parquet.read_table(path).to_pylist()
    [{'step': 0, 'loss': 0.5, 'eigenvalues': [2.0, 1.0]}]
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from thalweg.errors import InvalidInput, invalid
from thalweg.limits import check_limit
from thalweg.measure.sinks import TEXT_COLUMNS, replacing
from thalweg.registry import sinks

# The file is rewritten when so many rows are new, and a tenth of all: a kill loses no more, and
# every row is written eleven times at most.
NEW_ROWS, NEW_FRACTION = 100, 0.1


@sinks.register("parquet")
class Parquet:
    """Writes rows into one Parquet file: after each 100 rows at first, and when it is closed.

    All rows stay in memory, and are in the file once there is room for it. A column that first
    comes up later is empty (null) in the rows before.

    Args:
        path: the file; its folder must exist.
        overwrite: replace a file that is there.
        resume_at: continue a file that is there: its rows of earlier steps stay, later ones are
            dropped, since they are about to be made again.

    Raises:
        InvalidInput: the file is there and neither was asked for, or it is no such file; the folder
            does not exist; pyarrow is not installed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        resume_at: int | None = None,
    ) -> None:
        try:
            import pyarrow.parquet
        except ImportError:
            raise InvalidInput(
                "Parquet needs pyarrow: pip install 'thalweg[lab]', or use the sink 'csv'"
            ) from None
        self._pyarrow: Any = pyarrow
        self.path = Path(path)
        if not self.path.parent.is_dir():
            raise invalid("file", str(self.path), "a path in a folder that exists")
        self._rows: list[dict[str, Any]] = []
        if self.path.exists() and resume_at is not None:
            self._rows = self._rows_before(resume_at)
        elif self.path.exists() and not overwrite:
            raise invalid(
                "file",
                str(self.path),
                "one that is not there yet",
                "pass overwrite=True, or resume_at=step to continue it",
            )
        self._written: int | None = None

    def log(self, row: Mapping[str, Any], step: int) -> None:
        """Add a row."""
        self._rows.append({"step": step, **row})
        written = self._written or 0
        if len(self._rows) - written >= max(NEW_ROWS, NEW_FRACTION * written):
            self._write()

    def close(self) -> None:
        """Write the rows that are not in the file yet."""
        if len(self._rows) != self._written:
            self._write()

    def _rows_before(self, step: int) -> list[dict[str, Any]]:
        try:
            with self._pyarrow.parquet.ParquetFile(self.path) as file:
                cells = file.metadata.num_rows * file.metadata.num_columns
                check_limit("table_bytes", 8 * cells, self.path)
                rows = file.read().to_pylist()
            return [row for row in rows if row["step"] < step]
        except InvalidInput:
            raise
        except (self._pyarrow.ArrowException, LookupError, TypeError, ValueError):
            allowed = "a Parquet file with a column 'step'"
            raise invalid("file", str(self.path), allowed, "give another file") from None

    def _write(self) -> None:
        names = dict.fromkeys(name for row in self._rows for name in row) or {"step": None}
        columns = {name: self._column(name) for name in names}
        with replacing(self.path) as beside:
            self._pyarrow.parquet.write_table(self._pyarrow.table(columns), beside)
        self._written = len(self._rows)

    def _column(self, name: str) -> Any:
        """int64 for steps, text, else float64 or lists of it, whatever the first rows hold."""
        arrow = self._pyarrow
        values = [row.get(name) for row in self._rows]
        if name == "step":
            return arrow.array(values, arrow.int64())
        if name in TEXT_COLUMNS or any(isinstance(value, str) for value in values):
            return arrow.array([None if v is None else str(v) for v in values], arrow.string())
        is_list = any(isinstance(value, list | tuple) for value in values)
        return arrow.array(values, arrow.list_(arrow.float64()) if is_list else arrow.float64())
