"""Nothing outside of a study's folder is opened, hashed, cut or added to, whatever is in it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.lab.small_study import begin, small_spec
from tests.lab.test_whole_folders import NAME, folder, thalweg
from thalweg.errors import IntegrityError
from thalweg.lab.execution.schedule import tasks_of
from thalweg.lab.sharing import take_over
from thalweg.lab.store import StudyFolder, find_studies, load, open_study
from thalweg.lab.store.checkpoint import load_checkpoint
from thalweg.lab.store.links import open_plain
from thalweg.lab.store.lock import is_locked, locked

__all__ = ["folder"]

pytestmark = pytest.mark.skipif(os.name == "nt", reason="links and pipes are POSIX's")

PLACES = [
    ".lock",
    "spec.toml",
    "env.json",
    "seed-0",
    "seed-0/trunk",
    "seed-0/trunk/.lock",
    "seed-0/trunk/log.txt",
    "seed-0/trunk/run.toml",
    "seed-0/trunk/status.json",
    "seed-0/trunk/end-phase",
    "seed-0/trunk/metrics",
    "seed-0/trunk/metrics/segment-00000000-00000010.parquet",
    "seed-0/trunk/checkpoints",
    "seed-0/trunk/checkpoints/step-00000010",
    "seed-0/trunk/checkpoints/step-00000010/tensors.safetensors",
    "seed-0/trunk/checkpoints/step-00000010/manifest.json",
    "figures",
    "report.html",
]


def replaced(path: Path, outside: Path) -> Path:
    """Move what is at a place outside, and put a link to it there; return where it is now."""
    target = outside / path.name.lstrip(".")
    if path.exists():
        shutil.move(path, target)
    else:
        target.write_text("precious")
    path.symlink_to(target)
    return target


def state(path: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of change and of reading of all that is there."""
    every = [path, *sorted(path.rglob("*"))]
    return [(str(p), p.stat().st_mtime_ns, p.stat().st_size) for p in every]


@pytest.mark.parametrize("place", PLACES)
def test_a_link_is_refused_and_what_it_points_to_left_alone(
    place: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = replaced(folder / place, tmp_path)
    before = state(target)
    spec = small_spec()
    neighbour = begin(folder.parent / "two", spec)
    for command in ("resume", "report", "show", "check"):
        assert thalweg(command, NAME, folder=folder) == 4
        said = capsys.readouterr()
        assert f"{folder / place}: is a link" in said.err + said.out
    assert thalweg("list", folder=folder) == 0
    assert "not opened" in capsys.readouterr().out
    assert take_over(neighbour, tasks_of(spec)) == tasks_of(spec)
    assert thalweg("check", NAME, "--repair", folder=folder) == 0
    assert state(target) == before
    assert not any(path.is_symlink() for path in folder.rglob("*") if "set-aside" not in str(path))


@pytest.mark.parametrize("place", [p for p in PLACES if "." in p])
def test_a_pipe_is_refused_and_nobody_waits(
    place: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / place).unlink(missing_ok=True)
    os.mkfifo(folder / place)
    for command in ("resume", "check"):
        assert thalweg(command, NAME, folder=folder) == 4
        said = capsys.readouterr()
        assert str(folder / place) in said.err + said.out
    assert thalweg("list", folder=folder) == 0
    assert thalweg("check", NAME, "--repair", folder=folder) == 0


def test_what_a_run_at_work_removes_is_passed_over(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing = folder / "seed-0/trunk/checkpoints/.writing-step-00000011"
    writing.mkdir()
    scandir = os.scandir

    def removed_just_now(path: Path) -> Any:
        if Path(path) == writing:
            writing.rmdir()
        return scandir(path)

    monkeypatch.setattr(os, "scandir", removed_just_now)
    assert [study.path for study in find_studies(folder.parent)] == [folder]
    assert not writing.exists()
    assert load(folder) is not None


def test_a_study_that_is_a_link_out_of_the_root_is_opened_by_its_own_path_alone(
    folder: Path, tmp_path: Path
) -> None:
    elsewhere = shutil.move(folder, tmp_path / NAME)
    folder.symlink_to(elsewhere)
    assert find_studies(folder.parent) == []
    assert open_study(elsewhere).path == Path(elsewhere)


def test_a_manifest_names_no_file_elsewhere(folder: Path, tmp_path: Path) -> None:
    path = folder / "seed-0/trunk/checkpoints/step-00000010"
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sha256"]
    manifest["files"]["../../../../x"] = manifest["files"].pop("state.json")
    os.mkfifo(folder.parent / "x")
    text = json.dumps(manifest, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps({**manifest, "sha256": digest}))
    with pytest.raises(IntegrityError, match=r"manifest\.json: damaged"):
        load_checkpoint(path)


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_lock_or_log_is_never_something_else(kind: str, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    run = StudyFolder(tmp_path / "study").run(0, "trunk").create("seed = 0\n")
    for name in (".lock", "log.txt"):
        path = run.path / name
        path.symlink_to(precious) if kind == "link" else os.mkfifo(path)
    with pytest.raises(IntegrityError, match=r"\.lock"), locked(run.path):
        pass
    with pytest.raises(IntegrityError, match=r"\.lock"):
        is_locked(run.path)
    with pytest.raises(IntegrityError, match=r"log\.txt"):
        run.log("hello")
    with pytest.raises(IntegrityError):
        open_plain(run.path / "log.txt", os.O_RDONLY)
    assert precious.read_text() == "mine"
