"""No room, no inodes, a limit on files: which file is named, what is kept, what is to be done."""

from __future__ import annotations

import itertools
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.lab.small_study import begin, differing, execute, left, small_spec
from thalweg.errors import DiskFull
from thalweg.lab.execution.schedule import run_tasks, tasks_of
from thalweg.lab.store import RunFolder, durable
from thalweg.lab.store.checkpoint import save_checkpoint

KEPT = "what was saved before is kept"


@contextmanager
def small(folder: Path, options: str) -> Iterator[Path]:
    """A file system of its own."""
    folder.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("cannot mount a small file system here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture
def limited() -> Iterator[Any]:
    """Set the most bytes of a file that this process may write."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda most: resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_without_inodes_is_told_to_be(tmp_path: Path) -> None:
    with small(tmp_path / "small", "size=1m,nr_inodes=4") as folder:
        path = folder / "a" / "spec.toml"
        durable.make_folder(path.parent)
        durable.write_file(path, "old")
        (folder / "last").touch()
        with pytest.raises(DiskFull) as caught:
            durable.write_file(path, "new")
        assert path.read_text() == "old"
        with pytest.raises(DiskFull, match="no inode is left"):
            durable.make_folder(folder / "b")
    said = str(caught.value)
    assert said.startswith(
        f"disk full: {path}: 3 bytes needed, and no inode is left for one more file, "
    )
    assert said.endswith(f" free; {KEPT}: make room, then resume")


def test_a_limit_on_files_is_told_with_its_mend_and_nothing_half_is_left(
    tmp_path: Path, limited: Any
) -> None:
    path = tmp_path / "spec.toml"
    durable.write_file(path, "old")
    limited(1000)
    with pytest.raises(DiskFull) as caught:
        durable.write_file(path, "x" * 2000)
    with pytest.raises(DiskFull, match=f"file too large: {tmp_path / 'step-00000003'}: 4.. kB"):
        save_checkpoint(tmp_path, 3, {"theta": torch.zeros(1000)}, {})
    assert [file.name for file in tmp_path.iterdir()] == ["spec.toml"]
    assert path.read_text() == "old"
    assert str(caught.value) == (
        f"file too large: {path}: 2.0 kB needed, and this process may not write so much into one"
        f" file (ulimit -f); {KEPT}: raise that limit, then resume"
    )


def test_a_line_of_the_log_that_was_cut_short_is_closed(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.log("first")
    with (tmp_path / "log.txt").open("a") as file:
        file.write("2026-11-30T12:00:00Z tor")
    run.log("second\nwith more")
    run.log("third")
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.partition(" ")[2].strip() for line in lines] == [
        "first",
        "tor",
        "second",
        "with more",
        "third",
    ]


def test_a_full_log_names_itself_and_the_line_is_not_joined_to_the_next(tmp_path: Path) -> None:
    with small(tmp_path / "small", "size=8k") as folder:
        run = RunFolder(folder)
        run.log("x" * 6000)
        with pytest.raises(DiskFull, match=f"disk full: {folder / 'log.txt'}: 6.. kB needed"):
            run.log("x" * 6000)
        (folder / "log.txt").write_text("cut sho")
        run.log("next")
        assert (folder / "log.txt").read_text().splitlines()[0] == "cut sho"


def test_a_run_on_a_disk_that_runs_full_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"branches": {}, "phases.0.steps": 20, "checkpoint.every_steps": 2}
    spec = small_spec({**changes, "probes": {"loss": 1}})
    undisturbed = begin(tmp_path / "undisturbed", spec)
    execute(undisturbed, spec, "trunk")
    write, written = durable.write_file, itertools.count()
    with small(tmp_path / "small", "size=4m") as folder:
        filling = folder / "filling"

        def write_file(path: Path, *more: Any, **others: Any) -> None:
            if next(written) == 20:
                filling.write_bytes(bytes(shutil.disk_usage(folder).free))
            write(path, *more, **others)

        study = begin(folder / "study", spec)
        trunk = study.run(0, "trunk")
        means: dict[str, Any] = {"workers": 1, "device": "cpu", "threads": 1, "executor": "inline"}
        with monkeypatch.context() as patch:
            patch.setattr(durable, "write_file", write_file)
            (ending,) = run_tasks(study, tasks_of(spec), **means).endings.values()
        assert (ending.exit_code, ending.kind) == (1, "DiskFull")
        assert ending.message.startswith(f"disk full: {trunk.path}")
        assert KEPT in ending.message
        filling.unlink()
        assert run_tasks(study, tasks_of(spec), **means).exit_code == 0
        assert differing(left(study, "trunk"), left(undisturbed, "trunk")) == []


def test_a_checkpoint_without_inodes_is_told_after_it_was_taken_away(tmp_path: Path) -> None:
    with small(tmp_path / "small", "size=1m,nr_inodes=4") as folder:
        with pytest.raises(DiskFull, match=f"{folder / 'step-00000001'}: .* perhaps no inode was"):
            save_checkpoint(folder, 1, {"theta": torch.zeros(10)}, {})
        assert list(folder.iterdir()) == []
