from __future__ import annotations

import csv
from pathlib import Path

import pytest

from thalweg.errors import InvalidInput
from thalweg.measure.sinks import CONSOLE_COLUMNS, RowFile, console_heading, console_line

COLUMNS = ("step", "loss", "sharpness")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "curvature.csv"


def filled(path: Path, steps: range) -> None:
    file = RowFile(path, COLUMNS)
    for step in steps:
        file.append({"step": step, "loss": step / 3, "sharpness": None})


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_header_is_there_at_once_and_every_row_is_on_disk(path: Path) -> None:
    file = RowFile(path, COLUMNS)
    assert path.read_text() == "step,loss,sharpness\n"
    file.append({"step": 0, "loss": 1 / 3, "unknown": 5})
    assert read(path) == [{"step": "0", "loss": str(1 / 3), "sharpness": ""}]


def test_numbers_are_written_in_full(path: Path) -> None:
    value = 0.1234567890123456789
    RowFile(path, COLUMNS).append({"step": 3, "loss": value, "sharpness": float("nan")})
    row = read(path)[0]
    assert float(row["loss"]) == value
    assert row["sharpness"] == "nan"


def test_a_file_that_is_there_stays_unless_asked_otherwise(path: Path) -> None:
    filled(path, range(3))
    before = path.read_text()
    with pytest.raises(InvalidInput, match=r"one that is not there yet; pass overwrite=True, or"):
        RowFile(path, COLUMNS)
    assert path.read_text() == before
    RowFile(path, COLUMNS, overwrite=True)
    assert read(path) == []


def test_a_resumed_file_keeps_the_rows_before_and_drops_those_to_be_made_again(path: Path) -> None:
    filled(path, range(0, 50, 10))
    file = RowFile(path, COLUMNS, resume_at=25)
    file.append({"step": 30})
    assert [row["step"] for row in read(path)] == ["0", "10", "20", "30"]
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("cut", [1, 3, 12])
def test_a_line_that_was_cut_short_is_dropped(path: Path, cut: int) -> None:
    filled(path, range(3))
    path.write_text(path.read_text()[:-cut])
    RowFile(path, COLUMNS, resume_at=100)
    assert [row["step"] for row in read(path)] == ["0", "1"]


def test_resuming_without_a_file_starts_one(path: Path) -> None:
    RowFile(path, COLUMNS, resume_at=40)
    assert path.read_text() == "step,loss,sharpness\n"


@pytest.mark.parametrize("text", ["", "step,loss\n0,1\n", "no table at all"])
def test_a_file_of_other_columns_is_not_resumed(path: Path, text: str) -> None:
    path.write_text(text)
    with pytest.raises(InvalidInput, match="allowed: step,loss,sharpness; give another file"):
        RowFile(path, COLUMNS, resume_at=5)
    assert path.read_text() == text


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"nowhere.*a path in a folder that exists"):
        RowFile(tmp_path / "nowhere" / "rows.csv", COLUMNS)


def test_console_lines_are_aligned_with_their_heading() -> None:
    columns = tuple(CONSOLE_COLUMNS)
    numbers: dict[str, float] = dict.fromkeys(columns, -1.23456e-9)
    heading = console_heading(columns)
    for row in ({}, numbers | {"step": 1_234_567}):
        line = console_line(columns, row)
        assert len(line) == len(heading)
        assert len(line.split()) == len(columns)
    assert console_line(("step", "loss"), {"step": 7}).split() == ["7", "-"]
