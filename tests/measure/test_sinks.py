from __future__ import annotations

import csv
import warnings
from pathlib import Path
from typing import Any

import pytest

from thalweg import registry
from thalweg.errors import InvalidInput
from thalweg.measure.sinks import (
    CONSOLE_COLUMNS,
    CSV,
    Console,
    History,
    Sink,
    Sinks,
    WatchWarning,
    console_heading,
    console_line,
)
from thalweg.registry import register

COLUMNS = ("step", "loss", "sharpness")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "curvature.csv"


def filled(path: Path, steps: range) -> None:
    file = CSV(path, COLUMNS)
    for step in steps:
        file.log({"loss": step / 3, "sharpness": None}, step)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_header_is_there_at_once_and_every_row_is_on_disk(path: Path) -> None:
    file = CSV(path, COLUMNS)
    assert path.read_text() == "step,loss,sharpness\n"
    with pytest.warns(WatchWarning, match="unknown not in its header"):
        file.log({"step": 0, "loss": 1 / 3, "unknown": 5}, 0)
    assert read(path) == [{"step": "0", "loss": str(1 / 3), "sharpness": ""}]


def test_numbers_are_written_in_full(path: Path) -> None:
    value = 0.1234567890123456789
    CSV(path, COLUMNS).log({"loss": value, "sharpness": float("nan")}, 3)
    row = read(path)[0]
    assert float(row["loss"]) == value
    assert row["sharpness"] == "nan"


def test_a_file_that_is_there_stays_unless_asked_otherwise(path: Path) -> None:
    filled(path, range(3))
    before = path.read_text()
    with pytest.raises(InvalidInput, match=r"one that is not there yet; pass overwrite=True, or"):
        CSV(path, COLUMNS)
    assert path.read_text() == before
    CSV(path, COLUMNS, overwrite=True)
    assert read(path) == []


def test_a_resumed_file_keeps_the_rows_before_and_drops_those_to_be_made_again(path: Path) -> None:
    filled(path, range(0, 50, 10))
    file = CSV(path, COLUMNS, resume_at=25)
    file.log({}, 30)
    assert [row["step"] for row in read(path)] == ["0", "10", "20", "30"]
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("cut", [1, 3, 12])
def test_a_line_that_was_cut_short_is_dropped(path: Path, cut: int) -> None:
    filled(path, range(3))
    path.write_text(path.read_text()[:-cut])
    CSV(path, COLUMNS, resume_at=100)
    assert [row["step"] for row in read(path)] == ["0", "1"]


def test_resuming_without_a_file_starts_one(path: Path) -> None:
    CSV(path, COLUMNS, resume_at=40)
    assert path.read_text() == "step,loss,sharpness\n"


@pytest.mark.parametrize("text", ["", "step,loss\n0,1\n", "no table at all"])
def test_a_file_of_other_columns_is_not_resumed(path: Path, text: str) -> None:
    path.write_text(text)
    with pytest.raises(InvalidInput, match="allowed: step,loss,sharpness; give another file"):
        CSV(path, COLUMNS, resume_at=5)
    assert path.read_text() == text


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"nowhere.*a path in a folder that exists"):
        CSV(tmp_path / "nowhere" / "rows.csv", COLUMNS)


def test_console_lines_are_aligned_with_their_heading() -> None:
    columns = tuple(CONSOLE_COLUMNS)
    numbers: dict[str, float] = dict.fromkeys(columns, -1.23456e-9)
    heading = console_heading(columns)
    for row in ({}, numbers | {"step": 1_234_567}):
        line = console_line(columns, row)
        assert len(line) == len(heading)
        assert len(line.split()) == len(columns)
    assert console_line(("step", "loss"), {"step": 7}).split() == ["7", "-"]


def test_without_columns_the_header_is_that_of_the_first_row(path: Path) -> None:
    file = CSV(path)
    assert not path.exists()
    file.log({"loss": 0.5, "eigenvalues": [2.0, 1.0]}, 4)
    with pytest.warns(WatchWarning, match="late not in its header; give `columns`"):
        file.log({"late": 1.0}, 5)
    file.log({"late": 2.0}, 6)  # said once
    assert path.read_text().splitlines() == [
        "step,loss,eigenvalues", '4,0.5,"[2.0, 1.0]"', "5,,", "6,,",
    ]  # fmt: skip
    CSV(path, resume_at=5).log({"loss": 0.25}, 5)
    assert [row["step"] for row in read(path)] == ["4", "5"]
    assert read(path)[1] == {"step": "5", "loss": "0.25", "eigenvalues": ""}


def test_half_a_line_that_a_full_disk_took_is_taken_back(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = CSV(path, COLUMNS)

    class Full:
        def __init__(self, real: Any) -> None:
            self.real = real

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            self.real.close()

        def write(self, text: str) -> None:
            self.real.write(text[:3])
            self.real.flush()
            raise OSError(28, "No space left on device")

    opened = Path.open
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda *a, **b: Full(opened(*a, **b)))
        with pytest.raises(OSError, match="No space left"):
            file.log({"loss": 1.0}, 0)
    file.log({"loss": 2.0}, 1)
    assert path.read_text() == "step,loss,sharpness\n0,1.0,\n1,2.0,\n", "nothing whole is lost"


class Failing:
    def __init__(self) -> None:
        self.calls: list[str] = []

    def log(self, row: Any, step: int) -> None:
        self.calls.append(f"log {step}")
        row.clear()
        raise ConnectionError("no network")

    def close(self) -> None:
        self.calls.append("close")
        raise ConnectionError("no network")


def log_three_rows_and_close(sinks: Sinks) -> None:
    for step in range(3):
        sinks.log({"loss": 0.5}, step)
    sinks.close()
    sinks.close()


def test_a_sink_that_fails_says_so_once_and_the_others_get_every_row() -> None:
    failing, history = Failing(), History()
    assert isinstance(failing, Sink)
    sinks = Sinks([failing, history])
    with pytest.warns(WatchWarning, match=r"Failing: step 0 could .*no network.*continues") as seen:
        log_three_rows_and_close(sinks)
    assert len(seen) == 1
    assert failing.calls == ["log 0", "log 1", "log 2", "close"]
    assert history.rows == [{"step": step, "loss": 0.5} for step in range(3)]


def test_warnings_that_are_errors_do_not_stop_the_training(capsys: pytest.CaptureFixture) -> None:
    sinks = Sinks([Failing()])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sinks.log({}, 0)
        sinks.log({}, 1)
    assert capsys.readouterr().err.count("thalweg: Failing: step 0 could not be written") == 1


def test_only_a_failure_is_held_back() -> None:
    def interrupted(row: Any, step: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Sinks([interrupted]).log({}, 0)


def test_sinks_are_objects_functions_or_names(path: Path, capsys: pytest.CaptureFixture) -> None:
    rows: list[Any] = []

    @register.sink("of_this_test")
    def keep(row: Any, step: int) -> None:
        rows.append((step, row))

    try:
        sinks = Sinks(
            ["console", f"csv:{path}", "of_this_test", lambda row, step: rows.append(step)]
        )
        sinks.log({"loss": 0.5}, 7)
        sinks.close()
    finally:
        del registry.sinks["of_this_test"]
    assert rows == [(7, {"loss": 0.5}), 7]
    assert read(path) == [{"step": "7", "loss": "0.5"}]
    assert capsys.readouterr().err.split() == ["step", "loss", "7", "0.5"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("consol", "sink: got 'consol', .*did you mean 'console'"),
        ("csv", "sinks: got 'csv', allowed: 'csv:path'"),
        (CSV, r"sinks: got 'CSV', .*log\(row, step\).*; CSV\(...\)"),
        (3, "sinks: got 'int'"),
    ],
)
def test_what_is_no_sink_is_refused(given: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        Sinks([given])


def test_the_console_repeats_its_heading_after_twenty_rows(capsys: pytest.CaptureFixture) -> None:
    console = Console()
    for step in range(21):
        console.log({"loss": 1.0, "sharpness": None, "of_ones_own": 2.0}, step)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split() for line in lines if "loss" in line] == [["step", "loss"]] * 2
    assert len(lines) == 23
