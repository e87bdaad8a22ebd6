"""A sweep whose driver, workers or both are killed, and that several drivers share."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest
import tomli_w

from tests.lab.small_study import RAW, left
from thalweg.lab.store import RunFolder, StudyFolder, list_runs

PATIENCE = 500.0
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
GRID = ("--grid", "lr=0.05,0.1", "--grid", "branches.b.optimizer.lr=0.2,0.3")


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    """A spec whose runs take some tenths of a second, with checkpoints on the way."""
    file = tmp_path / "small.toml"
    phase = {"optimizer": {"name": "sgd", "lr": 0.05}, "batch_size": 20, "steps": 60}
    branches = {"a": {"steps": 60}, "b": {"steps": 60, "optimizer": {"lr": 0.01}}}
    own = {"probes": {"loss": 1, "sharpness": 5}, "phases": [phase], "branches": branches}
    file.write_text(tomli_w.dumps({**RAW, **own, "figures": []}))
    return file


def started(*words: str, folder: Path) -> subprocess.Popen[str]:
    """A driver or a worker, in a session of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "thalweg", *words],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ended(processes: Sequence[subprocess.Popen[str]]) -> list[int]:
    """Their exit status, each waited for."""
    for process in processes:
        _, said = process.communicate(timeout=PATIENCE)
        assert "Traceback" not in said, said
    return [process.returncode for process in processes]


def undisturbed(spec: Path) -> dict[str, dict[str, str]]:
    """What the sweep leaves when nothing happens."""
    assert ended([started("sweep", str(spec), *GRID, "--root", "calm", folder=spec.parent)]) == [0]
    return numbers(spec.parent / "calm")


def numbers(root: Path) -> dict[str, dict[str, str]]:
    """All that each run left."""
    found: dict[str, dict[str, str]] = {}
    for run in list_runs(root):
        name = str(run.path.relative_to(root))
        found[name] = left(StudyFolder(run.path.parent.parent), run.branch, seed=run.seed)
    return found


def pids_of_runs(root: Path) -> list[int]:
    """The processes that are at work on runs now."""
    states = [run.status() for run in list_runs(root)]
    return [state.pid for state in states if state is not None and state.state == "running"]


def kill_a_worker(root: Path) -> None:
    """Kill a process that is at work on a run; one that has just ended is not one."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        for pid in pids_of_runs(root):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                return
        time.sleep(0.01)
    raise AssertionError("no run was under way")


def times_made(run: RunFolder) -> int:
    """How often a run was begun at its first step, whatever it was resumed afterwards."""
    log = (run.path / "log.txt").read_text()
    return len(re.findall(r"started at step", log))


def test_killed_drivers_and_workers_lose_no_run_and_make_none_twice(spec: Path) -> None:
    expected = undisturbed(spec)
    root, draw = spec.parent / "runs", random.Random(0)
    command = ("sweep", str(spec), *GRID, "--workers", "2")
    for killed in ("driver", "driver", "driver", "worker"):
        driver = started(*command, folder=spec.parent)
        until = time.monotonic() + PATIENCE
        while not pids_of_runs(root) and driver.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        time.sleep(draw.uniform(0.0, 0.6))
        if killed == "driver":
            driver.kill()
            driver.communicate()
        else:
            kill_a_worker(root)
            assert ended([driver]) == [0]  # begun again from its last checkpoint
    assert ended([started("resume", str(next(root.glob("sweep-*"))), folder=spec.parent)]) == [0]
    assert numbers(root) == expected
    assert max(times_made(run) for run in list_runs(root)) == 1


def test_two_drivers_and_a_worker_share_the_runs(spec: Path) -> None:
    expected = undisturbed(spec)
    root = spec.parent / "runs"
    command = ("sweep", str(spec), *GRID, "--workers", "1")
    drivers = [started(*command, folder=spec.parent) for _ in range(2)]
    until = time.monotonic() + PATIENCE
    while not pids_of_runs(root) and time.monotonic() < until:
        time.sleep(0.05)
    worker = started("work", str(next(root.glob("sweep-*"))), folder=spec.parent)
    time.sleep(0.5)
    drivers[0].send_signal(signal.SIGTERM)
    assert ended([*drivers[1:], worker]) == [0, 0]
    assert ended(drivers[:1])[0] in (0, 75)
    assert numbers(root) == expected
    assert max(times_made(run) for run in list_runs(root)) == 1
