"""The metrics table survives kills, cuts and merges with every row once."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pandas
import pyarrow
import pytest
import torch

from thalweg.errors import IntegrityError, InvalidInput, ThalwegError
from thalweg.lab.store import durable, metrics
from thalweg.lab.store.metrics import Column, MetricsWriter, last_values, read_metrics
from thalweg.measure.sinks import Sink, Sinks

COLUMNS = [Column("step", "integer"), Column("loss"), Column("eigenvalues", "vector")]


def row(step: int) -> dict[str, object]:
    return {"step": step, "loss": step / 7, "eigenvalues": [float(step), -1.0]}


def write(folder: Path, steps: range, every: int = 10) -> MetricsWriter:
    writer = MetricsWriter(folder, COLUMNS)
    for step in steps:
        writer.log(row(step), step)
        if step % every == every - 1:
            writer.flush()
    return writer


def steps_in(folder: Path) -> list[int]:
    table = read_metrics(folder)
    if not len(table):
        return []
    for step, loss in zip(table["step"].to_pylist(), table["loss"].to_pylist(), strict=True):
        assert loss == step / 7
    return table["step"].to_pylist()


def segment_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_rows_come_back_as_they_were_appended(tmp_path: Path) -> None:
    write(tmp_path, range(25)).close()
    assert read_metrics(tmp_path).to_pylist() == [row(step) for step in range(25)]


def test_nan_and_infinity_are_kept_and_differ_from_not_measured(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, COLUMNS) as writer:
        writer.log({"loss": math.nan, "eigenvalues": [math.inf, -math.inf]}, 0)
        writer.log({}, 1)
    table = read_metrics(tmp_path)
    first, second = table["loss"].to_pylist()
    assert math.isnan(first)
    assert second is None
    assert table["eigenvalues"].to_pylist() == [[math.inf, -math.inf], None]


def test_the_writer_is_a_sink(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, COLUMNS)
    assert isinstance(writer, Sink)
    rows = Sinks([writer])
    rows.log(row(0), 0)
    rows.close()
    assert steps_in(tmp_path) == [0]


def test_floats_are_kept_to_the_last_bit(tmp_path: Path) -> None:
    values = [0.1, 5e-324, 1.7976931348623157e308, -0.0]
    with MetricsWriter(tmp_path, COLUMNS) as writer:
        for step, value in enumerate(values):
            writer.log({"loss": value}, step)
    found = read_metrics(tmp_path)["loss"].to_pylist()
    assert [value.hex() for value in found] == [value.hex() for value in values]


def test_tensors_and_arrays_are_taken_as_values(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, COLUMNS) as writer:
        values = {"loss": torch.tensor(0.5), "eigenvalues": torch.ones(2)}
        writer.log(values, numpy.int64(3))  # type: ignore[arg-type]
    expected = [{"step": 3, "loss": 0.5, "eigenvalues": [1.0, 1.0]}]
    assert read_metrics(tmp_path).to_pylist() == expected


def test_a_column_never_measured_is_there_from_the_first_row_on(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, COLUMNS) as writer:
        writer.log({}, 0)
    assert read_metrics(tmp_path).schema.names == ["step", "loss", "eigenvalues"]


@pytest.mark.parametrize(
    ("bad", "step", "said"),
    [
        ({"los": 0.1}, 1, "did you mean 'loss'"),
        ({"loss": 0.1}, None, "step"),
        ({}, 0, "after the last, 0"),
        ({"step": 2}, 0, "after the last, 0"),
        ({}, 1.5, "an integer"),
        ({"loss": "small"}, 1, "a number"),
        ({"loss": torch.zeros(2)}, 1, "a number"),
        ({"eigenvalues": 3.0}, 1, "a list of numbers"),
        ({"eigenvalues": [[1.0]]}, 1, "a list of numbers"),
    ],
)
def test_a_bad_row_is_refused_and_leaves_the_table_whole(
    tmp_path: Path, bad: dict[str, object], step: Any, said: str
) -> None:
    writer = MetricsWriter(tmp_path, COLUMNS)
    writer.log(row(0), 0)
    with pytest.raises(InvalidInput, match=said):
        writer.log(bad, step)
    writer.log(row(1), 1)
    writer.close()
    assert steps_in(tmp_path) == [0, 1]


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ([Column("loss")], "step"),
        ([Column("step", "float")], "step"),
        ([*COLUMNS, Column("loss")], "each name once"),
        ([*COLUMNS, Column("note", "text")], "integer, vector"),  # type: ignore[arg-type]
    ],
)
def test_impossible_columns_are_refused(tmp_path: Path, columns: list[Column], said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        MetricsWriter(tmp_path, columns)


def test_other_columns_than_those_in_the_folder_are_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path, range(3)).close()
    with pytest.raises(InvalidInput, match="sharpness"):
        MetricsWriter(tmp_path, [*COLUMNS, Column("sharpness")])


def test_a_segment_is_sealed_when_it_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "ROWS_PER_SEGMENT", 4)
    write(tmp_path, range(9), every=1000)
    assert steps_in(tmp_path) == list(range(8))


def test_a_segment_is_sealed_when_it_is_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "SECONDS_PER_SEGMENT", 0.0)
    write(tmp_path, range(3), every=1000)
    assert steps_in(tmp_path) == [0, 1, 2]


def test_many_segments_are_merged_on_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "MAX_SEGMENTS", 3)
    write(tmp_path, range(100)).close()
    assert len(segment_names(tmp_path)) <= 4
    assert steps_in(tmp_path) == list(range(100))


def test_compacting_leaves_one_file_that_pandas_reads(tmp_path: Path) -> None:
    write(tmp_path, range(35)).compact()
    assert segment_names(tmp_path) == ["segment-00000000-00000034.parquet"]
    frame = pandas.read_parquet(tmp_path)
    assert frame["step"].tolist() == list(range(35))
    assert frame["eigenvalues"][7].tolist() == [7.0, -1.0]


def test_pandas_reads_unmerged_segments_and_skips_unfinished_files(tmp_path: Path) -> None:
    write(tmp_path, range(30))
    (tmp_path / f"{durable.UNFINISHED}segment").write_bytes(b"half")
    assert sorted(pandas.read_parquet(tmp_path)["step"]) == list(range(30))


@pytest.mark.parametrize("from_step", [0, 1, 10, 14, 20, 34, 35, 99])
def test_truncating_drops_the_step_and_all_after(tmp_path: Path, from_step: int) -> None:
    writer = write(tmp_path, range(35))
    writer.truncate(from_step)
    assert steps_in(tmp_path) == list(range(min(from_step, 35)))
    for step in range(min(from_step, 35), 40):
        writer.log(row(step), step)
    writer.compact()
    assert steps_in(tmp_path) == list(range(40))


def test_a_new_writer_goes_on_after_the_last_sealed_row(tmp_path: Path) -> None:
    write(tmp_path, range(25))
    assert MetricsWriter(tmp_path, COLUMNS).last_step == 19
    write(tmp_path, range(20, 30)).close()
    assert steps_in(tmp_path) == list(range(30))


def test_an_empty_or_missing_folder_is_an_empty_table(tmp_path: Path) -> None:
    table = read_metrics(tmp_path / "none")
    assert len(table) == 0
    assert table.schema.field("step").type == pyarrow.int64()


def test_a_flipped_bit_is_noticed_or_changes_nothing(tmp_path: Path) -> None:
    write(tmp_path, range(10))
    expected = read_metrics(tmp_path)
    path = next(tmp_path.iterdir())
    data = path.read_bytes()
    noticed = 0
    for position in range(0, len(data), 3):
        flipped = bytearray(data)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        try:
            found = read_metrics(tmp_path)
        except IntegrityError:
            noticed += 1
        else:
            assert found.equals(expected)
    assert noticed > len(data) // 8


def test_a_segment_cut_short_is_noticed(tmp_path: Path) -> None:
    write(tmp_path, range(10))
    path = next(tmp_path.iterdir())
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(IntegrityError, match=path.name):
        read_metrics(tmp_path)


class Killed(BaseException):
    """Stands for a kill: from one instant on no call reaches the disk any more."""


def die_at(monkeypatch: pytest.MonkeyPatch, instant: int) -> Callable[[], bool]:
    """Make the call number `instant` to the file system, and all later ones, fail."""
    calls = itertools.count()
    state = {"dead": False}

    def guarded(call: Callable[..., object]) -> Callable[..., object]:
        def wrapper(*arguments: object, **options: object) -> object:
            state["dead"] = state["dead"] or next(calls) >= instant
            if state["dead"]:
                raise Killed
            return call(*arguments, **options)

        return wrapper

    for name in ("replace", "unlink", "open", "mkdir", "rmdir"):
        monkeypatch.setattr(Path, name, guarded(getattr(Path, name)))
    monkeypatch.setattr(os, "fsync", guarded(os.fsync))
    return lambda: state["dead"]


@pytest.mark.parametrize("action", ["compact", "truncate"])
def test_no_row_is_lost_or_doubled_whenever_a_merge_or_cut_is_killed(
    tmp_path: Path, action: str
) -> None:
    instant, died = 0, True
    while died:
        instant += 1
        folder = tmp_path / str(instant)
        writer = write(folder, range(40))
        with pytest.MonkeyPatch.context() as patch:
            dead = die_at(patch, instant)
            with contextlib.suppress(Killed):
                writer.compact() if action == "compact" else writer.truncate(15)
            died = dead()
        found = steps_in(folder)
        whole = list(range(40))
        assert found == whole if action == "compact" else found == whole[: max(15, len(found))]
        MetricsWriter(folder, COLUMNS)
        assert sorted(pandas.read_parquet(folder)["step"]) == found
    assert instant > 5


def test_a_full_disk_keeps_the_rows_and_names_the_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = write(tmp_path, range(10))
    writer.log(row(10), 10)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ThalwegError, match=r"disk full: .* needed, .* free"):
            writer.flush()
    assert segment_names(tmp_path) == ["segment-00000000-00000009.parquet"]
    writer.flush()
    assert steps_in(tmp_path) == list(range(11))


WRITE_FOREVER = """
import itertools, pathlib, sys
from thalweg.lab.store import metrics
metrics.MAX_SEGMENTS = 5
columns = [metrics.Column("step", "integer"), metrics.Column("loss"),
           metrics.Column("eigenvalues", "vector")]
writer = metrics.MetricsWriter(pathlib.Path(sys.argv[1]), columns)
start = 0 if writer.last_step is None else writer.last_step + 1
for step in itertools.count(start):
    writer.log({"loss": step / 7, "eigenvalues": [step, -1.0]}, step)
    if step % 5 == 4:
        writer.flush()
        sys.stdout.write(f"{step}\\n")
        sys.stdout.flush()
"""


@pytest.mark.slow
def test_kill_9_loses_no_sealed_row_and_a_reader_never_sees_a_gap(tmp_path: Path) -> None:
    instants = random.Random(7)
    sealed = -1
    for _ in range(3):
        with subprocess.Popen(
            [sys.executable, "-c", WRITE_FOREVER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            said = process.stdout.readline()
            for _ in range(instants.randrange(20)):
                found = steps_in(tmp_path)
                assert found == list(range(len(found)))
            process.send_signal(signal.SIGKILL)
            said += process.stdout.read()
        sealed = max([sealed, *map(int, said.splitlines()[:-1])])
        found = steps_in(tmp_path)
        assert found == list(range(len(found)))
        assert len(found) > sealed


# The last values alone.


def test_the_last_values_are_those_of_the_whole_table(tmp_path: Path) -> None:
    columns = [Column("step", "integer"), Column("loss"), Column("rare"), Column("never")]
    with MetricsWriter(tmp_path, columns) as writer:
        for step in range(9):
            writer.log({"loss": step / 7, "rare": 5.0 if step == 1 else None}, step)
            if step % 3 == 2:
                writer.flush()
    wanted = ["never", "rare", "loss", "step", "unknown"]
    assert last_values(tmp_path, wanted) == {"rare": 5.0, "loss": 8 / 7, "step": 8.0}
    assert list(last_values(tmp_path, wanted)) == ["rare", "loss", "step"]
    assert last_values(tmp_path / "none", wanted) == {}


def test_a_last_value_may_be_no_number(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, COLUMNS) as writer:
        writer.log({"loss": 1.0}, 0)
        writer.log({"loss": math.inf}, 1)
    assert last_values(tmp_path, ["loss"]) == {"loss": math.inf}


def test_last_values_of_another_run_or_of_a_table_with_a_hole_are_refused(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, COLUMNS, "0123") as writer:
        for step in range(3):
            writer.log(row(step), step)
            writer.flush()
    assert last_values(tmp_path, ["loss"], "0123") == {"loss": 2 / 7}
    with pytest.raises(IntegrityError, match="4567"):
        last_values(tmp_path, ["loss"], "4567")
    (tmp_path / segment_names(tmp_path)[1]).unlink()
    with pytest.raises(IntegrityError, match="segment 2 of its table, and 1 are before it"):
        last_values(tmp_path, ["loss"], "0123")


def test_last_values_are_read_while_the_writer_merges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = write(tmp_path, range(30))
    read_piece, looks = metrics.read_piece, itertools.count()

    def merged_meanwhile(*given: Any) -> Any:
        if next(looks) == 0:
            writer.compact()
        return read_piece(*given)

    monkeypatch.setattr(metrics, "read_piece", merged_meanwhile)
    assert last_values(tmp_path, ["loss"]) == {"loss": 29 / 7}
    monkeypatch.setattr(metrics, "read_piece", lambda *given: (tmp_path / "gone").read_bytes())
    with pytest.raises(ThalwegError, match="read again"):
        last_values(tmp_path, ["loss"])
