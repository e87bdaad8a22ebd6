"""Through Ray itself: a node is lost, the driver stopped and killed; nothing is lost or made twice.

pip install "ray>=2.40"
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab.execution.small_grid import (
    begin_grid,
    folders_of,
    is_under_way,
    not_made_once,
    tasks_of_grid,
    was_interrupted,
)
from thalweg.lab.execution.schedule import run_tasks
from thalweg.lab.store import StudyFolder

pytest.importorskip("ray", reason='pip install "ray>=2.40"')
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    # Ray leaves pipes and sockets of its processes to the collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
]
ROOT = Path(__file__).parents[3]
PATIENCE = 600.0
PLAIN = {"include_dashboard": False}
TRIES = 5


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A cluster of two nodes on this machine, each with a processor; jobs run on either."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    # By Ray's default its tasks give way to all other processes of a machine.
    monkeypatch.setenv("RAY_worker_niceness", "0")
    # The workers are to load this package, wherever it is.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    found = tried(lambda: Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **PLAIN}))
    try:
        yield found
    finally:
        found.shutdown()


def tried(start: Callable[[], Any]) -> Any:
    """What `start` returns. Ray gives a node 30 seconds to start, too few on a busy machine."""
    for _ in range(TRIES - 1):
        with contextlib.suppress(Exception):
            return start()
    return start()


def wait_until(what: Callable[[], object], driver: subprocess.Popen[str] | None = None) -> None:
    until = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < until
        assert driver is None or driver.poll() is None, driver.communicate()[1]
        time.sleep(0.2)


def test_a_grid_is_done_though_a_node_is_lost(cluster: Any, tmp_path: Path) -> None:
    second = tried(lambda: cluster.add_node(num_cpus=1))
    tasks, said = begin_grid(tmp_path), []

    def lose_the_second() -> None:
        wait_until(lambda: sum(map(is_under_way, folders_of(tasks))) == 2)
        cluster.remove_node(second, allow_graceful=False)

    thread = threading.Thread(target=lose_the_second)
    thread.start()
    outcome = run_tasks(
        StudyFolder(tmp_path),
        tasks,
        workers=2,
        device="cpu",
        threads=1,
        executor="ray",
        say=said.append,
        options={"address": cluster.address},
    )
    thread.join()
    assert outcome.exit_code == 0, outcome.endings
    assert not_made_once(tasks) == {}
    assert was_interrupted(tasks)
    assert said == ["a node of the Ray cluster is lost, 1 left: its jobs begin again elsewhere"]


def test_a_driver_that_is_stopped_and_killed_goes_on(cluster: Any, tmp_path: Path) -> None:
    tried(lambda: cluster.add_node(num_cpus=1))
    begin_grid(tmp_path, batches=[20])
    tasks = tasks_of_grid(tmp_path)
    words = ["-m", "tests.lab.execution.small_grid", str(tmp_path), "ray"]

    def begun() -> subprocess.Popen[str]:
        command = [sys.executable, *words, f"address={cluster.address}"]
        driver = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        wait_until(lambda: any(map(is_under_way, folders_of(tasks))), driver)
        return driver

    driver = begun()
    driver.terminate()
    _, said = driver.communicate(timeout=PATIENCE)
    assert driver.returncode == 75, said
    assert not any(map(is_under_way, folders_of(tasks)))
    states = [status.state for run in folders_of(tasks) if (status := run.status()) is not None]
    assert "interrupted" in states
    driver = begun()
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    driver = begun()  # perhaps while the runs of the killed one save their checkpoints
    _, said = driver.communicate(timeout=PATIENCE)
    assert driver.returncode == 0, said
    assert not_made_once(tasks) == {}
    assert was_interrupted(tasks)
