"""Through Slurm on one node: interrupted elements come back, nothing is lost or made twice.

`tests/lab/execution/slurm_node.py` says what must be installed.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.lab.execution.slurm_node import slurm_node
from tests.lab.execution.small_grid import (
    begin_grid,
    folders_of,
    is_under_way,
    not_made_once,
    was_interrupted,
)
from thalweg.lab.execution.schedule import Assignment, Outcome, Task
from thalweg.lab.execution.slurm import submit_to_slurm
from thalweg.lab.execution.slurm_queue import cancel, status
from thalweg.lab.store import StudyFolder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
PATIENCE = 600.0


@pytest.fixture(scope="module")
def slurm() -> Iterator[Path]:
    with slurm_node(max_array_size=6) as root:
        yield root


def submit(folder: Path, tasks: list[Task], **options: object) -> Outcome:
    every = {"time": "0:30:00", **options}
    return submit_to_slurm(Assignment(StudyFolder(folder), tasks, 2, "cpu", 1, options=every))


def wait_until(what: Callable[[], object]) -> None:
    until = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < until, subprocess.run(
            ["scontrol", "show", "job"], capture_output=True, text=True, check=False
        ).stdout
        time.sleep(0.5)


def logs(folder: Path) -> str:
    files = sorted(folder.glob("slurm/*/*.log"))
    return "\n".join(f"{file.name}:\n{file.read_text()}" for file in files)


def is_told_to_stop(folder: Path) -> bool:
    """Send what Slurm sends before the time limit, until an element has heard it.

    Slurm takes no signal for an element that it is about to start.
    """
    words = ["--batch", "--signal=USR1", "--state=RUNNING", "--user=root"]
    subprocess.run(["scancel", *words], capture_output=True, check=False)
    time.sleep(2)
    return "interrupted: queued again" in logs(folder)


def test_a_grid_is_done_though_its_elements_are_told_to_stop_and_queued_again(
    slurm: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "a grid at 100%"
    tasks = begin_grid(folder)
    # Six elements fit into one array of this cluster.
    assert submit(folder, tasks).submitted.endswith(": 8 elements")
    assert submit(folder, tasks).submitted == "nothing; in Slurm's queue already: 8"
    wait_until(lambda: any(map(is_under_way, folders_of(tasks))))
    wait_until(lambda: is_told_to_stop(folder))
    wait_until(lambda: any(map(is_under_way, folders_of(tasks))))
    running = [one for one in status(folder) if one.queue.startswith("RUNNING")]
    # As an administrator does before maintenance.
    subprocess.run(["scontrol", "requeue", running[0].number], check=True)
    wait_until(lambda: not any(one.is_queued for one in status(folder)))
    assert not_made_once(tasks) == {}, logs(folder)
    assert was_interrupted(tasks)
    assert {tuple(one.runs.values()) for one in status(folder)} == {("done", "done")}


def test_what_was_cancelled_goes_on_when_it_is_submitted_again(slurm: Path, tmp_path: Path) -> None:
    tasks = begin_grid(tmp_path, batches=[20])
    submit(tmp_path, tasks)
    wait_until(lambda: any(map(is_under_way, folders_of(tasks))))
    assert len(cancel(tmp_path)) == 4
    wait_until(lambda: not any(one.is_queued for one in status(tmp_path)))
    assert any(run.status() is None for run in folders_of(tasks))
    time.sleep(5)  # an element that was queued again after all would be back by now
    assert not any(one.is_queued for one in status(tmp_path)), logs(tmp_path)
    submit(tmp_path, tasks)
    wait_until(lambda: not any(one.is_queued for one in status(tmp_path)))
    assert not_made_once(tasks) == {}, logs(tmp_path)
    assert was_interrupted(tasks)
