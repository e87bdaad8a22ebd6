from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from thalweg.errors import InvalidInput
from thalweg.integrations.parquet import NEW_ROWS, Parquet
from thalweg.measure.sinks import Sink, Sinks


def read(path: Path) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rows.parquet"


def test_numbers_come_back_as_they_were_and_missing_ones_as_null(path: Path) -> None:
    sink = Parquet(path)
    assert isinstance(sink, Sink)
    rows: list[dict[str, Any]] = [
        {"step": 0, "loss": None, "eigenvalues": None},
        {"step": 5, "loss": 1 / 3, "eigenvalues": [2.0, 0.1]},
        {"step": 10, "loss": 2, "eigenvalues": None, "late": 1.5},
    ]
    for row in rows:
        sink.log({name: value for name, value in row.items() if name != "step"}, row["step"])
    sink.close()
    table = read(path)
    assert table.to_pylist() == [{**row, "late": row.get("late")} for row in rows]
    kinds = ["int64", "double", "list<element: double>", "double"]
    assert [str(field.type) for field in table.schema] == kinds


def test_a_kill_loses_the_last_rows_alone(path: Path) -> None:
    sink = Parquet(path)
    for step in range(NEW_ROWS + 3):
        sink.log({"loss": 0.5}, step)
    assert read(path).num_rows == NEW_ROWS
    sink.close()
    assert read(path).num_rows == NEW_ROWS + 3
    assert [found.name for found in path.parent.iterdir()] == [path.name]


def test_a_file_that_is_there_stays_unless_asked_otherwise(path: Path) -> None:
    path.write_text("mine")
    with pytest.raises(InvalidInput, match="not there yet; pass overwrite=True, or"):
        Sinks([f"parquet:{path}"])
    assert path.read_text() == "mine"
    Parquet(path, overwrite=True).close()
    assert read(path).num_rows == 0
    with pytest.raises(InvalidInput, match="a path in a folder that exists"):
        Parquet(path.parent / "nowhere" / "rows.parquet")


def test_a_resumed_file_keeps_the_rows_before_and_drops_those_to_be_made_again(path: Path) -> None:
    first = Parquet(path, resume_at=0)
    for step in range(0, 50, 10):
        first.log({"loss": step / 3}, step)
    first.close()
    again = Parquet(path, resume_at=25)
    again.log({"loss": None}, 30)
    again.close()
    kept = [{"step": step, "loss": step / 3} for step in (0, 10, 20)]
    assert read(path).to_pylist() == [*kept, {"step": 30, "loss": None}]
    path.write_text("mine")
    with pytest.raises(InvalidInput, match="allowed: a Parquet file with a column 'step'"):
        Parquet(path, resume_at=5)
    assert path.read_text() == "mine"


def test_without_pyarrow_the_package_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "pyarrow.parquet", raising=False)
    with pytest.raises(InvalidInput, match=r"needs pyarrow: pip install .thalweg\[lab\]"):
        Parquet(path)
