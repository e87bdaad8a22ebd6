"""Study and run folders: nothing overwritten, one writer at a time, always readable."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from thalweg.environment import environment
from thalweg.errors import IntegrityError, InvalidInput, ThalwegError
from thalweg.lab.store import durable
from thalweg.lab.store import lock as runlock
from thalweg.lab.store.diskspace import check_disk, estimate_disk
from thalweg.lab.store.folders import (
    RunFolder,
    StudyFolder,
    find_studies,
    list_runs,
    open_study,
)
from thalweg.lab.store.metrics import Column, MetricsWriter
from thalweg.lab.store.status import Status

NAME = "main-digits-0123abcd"


@pytest.fixture
def study(tmp_path: Path) -> StudyFolder:
    return StudyFolder.create(tmp_path, NAME, "k = 10\n")


@pytest.fixture
def run(study: StudyFolder) -> RunFolder:
    return study.run(0, "trunk").create("seed = 0\n")


def write_steps(run: RunFolder, steps: range, *columns: Column) -> None:
    with MetricsWriter(run.metrics, [Column("step", "integer"), *columns]) as writer:
        for step in steps:
            writer.log({column.name: float(step) for column in columns}, step)


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of a run until it is stopped."""
    code = (
        "import sys, pathlib\n"
        "from thalweg.lab.store import RunFolder, Status\n"
        "run = RunFolder(pathlib.Path(sys.argv[1]))\n"
        "with run.locked():\n"
        "    run.write_status(Status('running', step=3))\n"
        "    sys.stdout.write('held\\n'); sys.stdout.flush(); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_study_keeps_its_spec_and_environment(study: StudyFolder) -> None:
    assert study.path.name == study.name == NAME
    assert study.spec_text == "k = 10\n"
    assert json.loads((study.path / "env.json").read_text())["python"] == sys.version.split()[0]


def test_creating_a_study_again_opens_it_and_overwrites_nothing(
    study: StudyFolder, tmp_path: Path
) -> None:
    again = StudyFolder.create(tmp_path, NAME, "k = 11\n")
    assert again == study
    assert again.spec_text == "k = 10\n"
    assert len(again.environments()) == 1
    again.write_spec_text("k = 12\n")
    assert study.spec_text == "k = 12\n"


def test_another_environment_is_recorded_beside_the_earlier_one(
    study: StudyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = study.environments()[0]
    monkeypatch.setattr("thalweg.lab.store.folders.environment", lambda: {**first, "torch": "9.9"})
    study.record_environment()
    study.record_environment()
    assert study.environments() == [first, {**first, "torch": "9.9"}]


def test_the_environment_says_versions_machine_and_device() -> None:
    found = environment()
    assert found.keys() >= {"thalweg", "python", "torch", "numpy", "pyarrow", "platform"}
    assert found["processor"]
    assert found["torch_threads"] >= 1
    assert found["devices"][0] == "cpu"
    assert json.loads(json.dumps(found)) == found


def test_verdicts_are_kept(study: StudyFolder) -> None:
    assert study.read_verdicts() is None
    study.write_verdicts([{"claim": "aligned", "outcome": "holds", "spread": math.nan}])
    assert study.read_verdicts() == [{"claim": "aligned", "outcome": "holds", "spread": "nan"}]


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../out", "a/b", "/etc", "a\\b", ".hidden", "a\n", "x" * 121, "a.", "é"]
)
def test_a_name_cannot_leave_its_folder(study: StudyFolder, tmp_path: Path, name: str) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InvalidInput, match="study name"):
        StudyFolder.create(tmp_path, name, "")
    with pytest.raises(InvalidInput, match="branch"):
        study.run(0, name)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("seed", [-1, True, "0", 1.0])
def test_a_seed_is_a_natural_number(study: StudyFolder, seed: Any) -> None:
    with pytest.raises(InvalidInput, match="seed"):
        study.run(seed, "sgd")


def test_runs_are_listed_by_seed_with_the_trunk_first(study: StudyFolder, tmp_path: Path) -> None:
    for seed in (10, 2):
        for branch in ("sgd", "trunk", "bulk-sgd"):
            study.run(seed, branch).create("")
    (study.path / "seed-x" / "sgd").mkdir(parents=True)
    (study.path / "seed-x" / "sgd" / "run.toml").touch()
    (study.path / "figures").mkdir()
    found = [(run.seed, run.branch) for run in study.runs()]
    assert found == [(s, b) for s in (2, 10) for b in ("trunk", "bulk-sgd", "sgd")]
    assert list_runs(tmp_path) == study.runs()


def test_studies_are_found_below_their_root(study: StudyFolder, tmp_path: Path) -> None:
    (tmp_path / "something-else").mkdir()
    assert find_studies(tmp_path) == [study]
    assert find_studies(tmp_path / "none") == []


def test_a_study_is_opened_by_path_name_or_beginning(study: StudyFolder, tmp_path: Path) -> None:
    for given in (study, study.path, str(study.path), NAME, "main-d"):
        assert open_study(given, tmp_path) == study
    StudyFolder.create(tmp_path, "main-mnist-4567cdef", "")
    with pytest.raises(InvalidInput, match=f"one of {NAME}, main-mnist-4567cdef"):
        open_study("main", tmp_path)
    with pytest.raises(InvalidInput, match=f"did you mean '{NAME}'"):
        open_study("mian-digits-0123abcd", tmp_path)
    with pytest.raises(InvalidInput, match="there is none in"):
        open_study("main", tmp_path / "none")


def test_a_run_with_other_settings_is_not_overwritten(run: RunFolder) -> None:
    assert run.create("seed = 0\n") == run
    with pytest.raises(InvalidInput, match="nothing is overwritten"):
        run.create("seed = 1\n")
    assert run.run_text == "seed = 0\n"
    run.write_run_text("seed = 0\nsteps = 9\n")
    assert run.run_text == "seed = 0\nsteps = 9\n"


def test_a_folder_without_its_texts_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"run\.toml"):
        _ = StudyFolder(tmp_path).run(0, "sgd").run_text
    with pytest.raises(InvalidInput, match="seed-<number>"):
        _ = RunFolder(tmp_path / "sgd").seed


def test_a_status_comes_back_with_its_numbers(run: RunFolder) -> None:
    assert run.status() is None
    status = Status("diverged", 7, 9, 1.5, math.nan, None, math.inf, "loss is NaN at step 7")
    run.write_status(status)
    found = run.status()
    assert found is not None
    assert found.loss is not None
    assert math.isnan(found.loss)
    assert replace(found, loss=None) == replace(status, loss=None)
    assert found.pid == os.getpid()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", found.updated)


def test_an_unknown_state_is_refused() -> None:
    with pytest.raises(InvalidInput, match="did you mean 'running'"):
        Status("runing")  # type: ignore[arg-type]


@pytest.mark.parametrize("content", ["", "[]", '{"state": "asleep"}', '{"step": 1}'])
def test_a_damaged_status_is_named(run: RunFolder, content: str) -> None:
    (run.path / "status.json").write_text(content)
    with pytest.raises(IntegrityError, match=r"status\.json"):
        run.status()


def test_a_status_of_a_later_version_is_still_read(run: RunFolder) -> None:
    run.write_status(Status("done"))
    path = run.path / "status.json"
    written = {**json.loads(path.read_text()), "temperature": 3}
    del written["sha256"]
    path.write_text(json.dumps({**written, "sha256": durable.digest_of(written)}))
    found = run.status()
    assert found is not None
    assert found.state == "done"


def test_a_second_process_is_refused_and_told_who_is_first(run: RunFolder) -> None:
    with holder(run.path) as process:
        status = run.status()
        assert status is not None
        assert status.state == "running"
        said = f"in use by process {process.pid} on .* since"
        with pytest.raises(InvalidInput, match=said), run.locked():
            pass


def test_after_kill_9_the_lock_is_free_and_the_run_is_interrupted(run: RunFolder) -> None:
    with holder(run.path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        status = run.status()
        assert status is not None
        assert (status.state, status.step) == ("interrupted", 3)
        assert f"process {process.pid}" in status.message
        with run.locked():
            pass


def test_one_process_cannot_take_a_lock_twice_and_can_take_it_again(run: RunFolder) -> None:
    with run.locked():
        assert runlock.is_locked(run.path)
        with pytest.raises(InvalidInput, match=f"process {os.getpid()} "), run.locked():
            pass
        assert runlock.is_locked(run.path)
    assert not runlock.is_locked(run.path)
    with run.locked():
        pass


def test_taking_the_lock_removes_what_a_killed_process_left(run: RunFolder) -> None:
    left = run.path / f"{durable.UNFINISHED}status.json-1-1"
    left.write_text("half")
    with run.locked():
        assert not left.exists()


def test_a_file_system_without_locks_is_said_not_fatal(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: Any, **__: Any) -> bool:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(runlock, "_try_lock", unsupported)
    monkeypatch.setattr(runlock, "_release", lambda _: None)
    with pytest.warns(UserWarning, match="this file system has no locks"), run.locked():
        assert not runlock.is_locked(run.path)


def test_the_log_is_lines_with_the_time(run: RunFolder) -> None:
    run.log("started")
    run.log("first line\nsecond line\n")
    time = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"
    text = (run.path / "log.txt").read_text()
    assert re.fullmatch(f"{time} started\n{time} first line\n    second line\n", text)


def test_the_estimate_covers_what_a_run_really_takes(run: RunFolder) -> None:
    import torch

    from thalweg.lab.store.checkpoint import save_checkpoint

    parameters, k, rows = 20_000, 4, 2_000
    columns = [Column("step", "integer"), *(Column(f"c{i}") for i in range(20))]
    with MetricsWriter(run.metrics, columns) as writer:
        for step in range(rows):
            writer.log({column.name: step + 0.1 for column in columns}, step)
    bases = {f"basis{i}": torch.rand(parameters, k) for i in range(3)}
    for step in (1, 2, 3):
        state = {"theta": torch.rand(parameters), "momentum": torch.rand(parameters), **bases}
        save_checkpoint(run.checkpoints, step, state, {}, keep=2)
    taken = sum(path.stat().st_size for path in run.path.rglob("*") if path.is_file())
    estimate = estimate_disk(parameters, k, 1, 2, rows, len(columns))
    assert taken < estimate < 4 * taken


def test_too_little_room_is_said_beforehand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("thalweg.lab.store.diskspace.free_bytes", lambda _: 5_300_000_000)
    assert check_disk(tmp_path, 120_000_000).endswith("120.0 MB will be written, 5.3 GB free")
    with pytest.raises(ThalwegError, match=r"6\.0 GB will be written, 5\.3 GB free; make room"):
        check_disk(tmp_path, 6_000_000_000)


def test_free_space_is_that_of_the_nearest_folder_there_is(tmp_path: Path) -> None:
    assert durable.free_bytes(tmp_path / "not" / "yet") > 0


@pytest.mark.parametrize(
    ("code", "error", "said"),
    [
        (errno.ENOSPC, ThalwegError, "disk full"),
        (errno.EDQUOT, ThalwegError, "disk full"),
        (errno.EROFS, InvalidInput, "cannot be written to"),
        (errno.EACCES, InvalidInput, "cannot be written to"),
    ],
)
def test_a_failing_write_keeps_the_old_file_and_says_why(
    run: RunFolder,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    error: type[ThalwegError],
    said: str,
) -> None:
    run.write_status(Status("running", step=1))
    before = sorted(run.path.iterdir())

    def failing(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(error, match=said) as caught:
        run.write_status(Status("running", step=2))
    assert str(run.path) in str(caught.value)
    monkeypatch.undo()
    assert sorted(run.path.iterdir()) == before
    assert json.loads((run.path / "status.json").read_text())["step"] == 1


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(InvalidInput, match=r"runs.* is a file where a folder is needed"):
        StudyFolder.create(tmp_path / "runs", NAME, "")


def test_the_store_imports_nothing_heavy() -> None:
    code = (
        "import sys, thalweg.lab.store.folders, thalweg.lab.store.checkpoint\n"
        "heavy = {'torch', 'pandas', 'pyarrow', 'numpy'} & sys.modules.keys()\n"
        "sys.exit(' '.join(heavy) or 0)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
