"""What a kill, a power cut or a full disk does to the file of a `watch`, and how that is mended."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from thalweg.errors import InvalidInput
from thalweg.integrations import Parquet
from thalweg.measure.sinks import CSV, Sinks, WatchWarning

COLUMNS = ("step", "loss", "failure")


def filled(path: Path, steps: int, failure: str | None = None) -> None:
    file = CSV(path, COLUMNS)
    for step in range(steps):
        file.log({"loss": step / 3, "failure": failure}, step)


def steps_of(path: Path) -> list[int]:
    """The steps in a file, read as one would without Thalweg."""
    import pandas

    return pandas.read_csv(path)["step"].tolist()


def resumed(path: Path, at: int = 100) -> list[int]:
    CSV(path, COLUMNS, resume_at=at).log({"loss": 1.0}, at)
    return steps_of(path)


@pytest.mark.parametrize("failure", ["λ is closed", 'said "no"', "two\nlines", "a\u2028b", None])
def test_a_file_cut_at_any_byte_keeps_its_whole_rows(tmp_path: Path, failure: str | None) -> None:
    whole, path = tmp_path / "whole.csv", tmp_path / "rows.csv"
    filled(whole, 3, failure)
    content = whole.read_bytes()
    filled(tmp_path / "two.csv", 2, failure)
    for cut in range((tmp_path / "two.csv").stat().st_size, len(content)):
        path.write_bytes(content[:cut])
        assert resumed(path) == [0, 1, 100], cut
    path.write_bytes(content)
    assert resumed(path) == [0, 1, 2, 100]


def test_zeros_that_a_power_cut_left_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    filled(path, 3)
    with path.open("ab") as file:
        file.write(b"\0" * 4096)
    assert resumed(path) == [0, 1, 2, 100]


def test_a_row_in_the_middle_that_is_none_is_refused_and_nothing_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('step,loss,failure\n0,1.0,"a"b"\n1,2.0,\n2,3.0,\n')
    before = path.read_bytes()
    with pytest.raises(InvalidInput, match="a CSV file in UTF-8"):
        CSV(path, COLUMNS, resume_at=100)
    assert path.read_bytes() == before


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of 64 kB with room for ten files."""
    folder = tmp_path / "small"
    folder.mkdir()
    options = "size=64k,nr_inodes=10"
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("cannot mount a small file system here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def log(sinks: Sinks, steps: range) -> None:
    for step in steps:
        sinks.log({"loss": float(step), "text": "x" * 100, "failure": None}, step)


@pytest.mark.parametrize("kind", [CSV, Parquet])
def test_rows_wait_for_room_on_a_full_disk_and_the_file_is_named(small: Path, kind: type) -> None:
    path = small / "rows"
    sinks = Sinks([kind(path)])
    log(sinks, range(1))
    filling = small / "filling"
    filling.write_bytes(bytes(shutil.disk_usage(small).free))
    with pytest.warns(WatchWarning, match="No space left") as told:
        log(sinks, range(1, 150))
    (warning,) = [str(each.message) for each in told if "room" in str(each.message)]
    assert f"{path} keeps its earlier rows, and gets the others once there is room" in warning
    filling.unlink()
    assert not list(small.glob("*.part"))
    sinks.close()
    if kind is Parquet:
        import pandas

        assert pandas.read_parquet(path)["step"].tolist() == list(range(150))
    else:
        assert steps_of(path) == list(range(150))


def test_a_limit_on_the_size_of_a_file_is_a_full_disk(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    path = tmp_path / "rows.csv"
    sinks = Sinks([CSV(path, (*COLUMNS, "text"))])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        with pytest.warns(WatchWarning, match="File too large.*gets the others once there is room"):
            log(sinks, range(20))
        assert path.read_bytes().endswith(b"\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    sinks.close()
    assert steps_of(path) == list(range(20))
