"""Jobs as tasks of Ray: in order, begun again, asked to stop; with tasks that are threads."""

from __future__ import annotations

import importlib.util
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.lab.execution.fake_ray import FakeRay, RayError, RayTaskError
from thalweg.errors import InvalidInput, MissingExtra
from thalweg.lab.execution import ray as on_ray
from thalweg.lab.execution.schedule import Assignment, Outcome, Task
from thalweg.lab.store import StudyFolder
from thalweg.lab.store.status import Status

Worker = Callable[[Path, int], tuple[int, str]]


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.setitem(sys.modules, "ray.exceptions", fake.exceptions)
    monkeypatch.setattr(on_ray, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(on_ray, "WAIT_SECONDS", 0.02)
    return fake


def tasks_of_sweep(root: Path, seeds: int = 2) -> list[Task]:
    """A trunk and a branch of each seed of two studies; the second one's trunk is the first's."""
    found: list[Task] = []
    for seed in range(seeds):
        first = Task(seed, "trunk", study=root / "first")
        second = Task(seed, "trunk", study=root / "second", same_as=first)
        found += [first, second]
        found += [Task(seed, "sgd", study=root / name) for name in ("first", "second")]
    return found


def run(
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    worker: Worker,
    tasks: Sequence[Task] | None = None,
    options: Mapping[str, object] | None = None,
    **means: Any,
) -> tuple[Outcome, list[str]]:
    """What becomes of a sweep where each job is done by `worker`; and what is said."""

    def stand_in(words: Sequence[str], threads: int, folder: str) -> tuple[int, str]:
        return worker(Path(words[0]), int(words[2]))

    monkeypatch.setattr(on_ray, "run_worker", stand_in)
    said: list[str] = []
    given = {"workers": 2, "device": "cpu", "threads": 1, "say": said.append, **means}
    every = tasks_of_sweep(root) if tasks is None else tasks
    assignment = Assignment(StudyFolder(root), every, options=options or {}, **given)
    return on_ray.run_on_ray(assignment), said


def leave(study: Path, seed: int, **states: Any) -> None:
    """Leave runs in these states."""
    for branch, state in states.items():
        StudyFolder(study).run(seed, branch).create(f"seed = {seed}\n").write_status(Status(state))


def do(study: Path, seed: int) -> tuple[int, str]:
    leave(study, seed, trunk="done", sgd="done")
    return 0, ""


def test_all_is_done_in_waves_so_many_jobs_at_a_time(
    ray: FakeRay, quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, at_work, most, order = threading.Lock(), [0], [0], []

    def worker(study: Path, seed: int) -> tuple[int, str]:
        with lock:
            order.append(study.name)
            at_work[0] += 1
            most[0] = max(most[0], at_work[0])
        threading.Event().wait(0.05)
        with lock:
            at_work[0] -= 1
        return do(study, seed)

    tasks = tasks_of_sweep(quick_path, seeds=3)
    outcome, said = run(quick_path, monkeypatch, worker, tasks)
    assert outcome.exit_code == 0
    assert set(outcome.endings) == set(tasks)
    assert (outcome.left_out, said) == ([], [])
    assert order == ["first"] * 3 + ["second"] * 3
    assert most == [2]
    assert ray.given is None, "disconnected"


def test_a_task_asks_for_what_a_run_needs(
    ray: FakeRay, quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray.resources = {"CPU": 8.0, "GPU": 1.0}
    options = {"gpus": "0.25", "restarts": 3}
    _, said = run(quick_path, monkeypatch, do, tasks_of_sweep(quick_path)[:1], options, threads=4)
    asked = {"num_cpus": 4, "num_gpus": 0.25, "max_retries": 3, "name": "first seed 0"}
    assert (ray.asked, said) == ([asked], [])
    run(quick_path, monkeypatch, do, tasks_of_sweep(quick_path)[:1], device="cuda")
    assert ray.asked[-1]["num_gpus"] == 1.0


def test_what_no_node_has_is_said_and_waited_for(
    ray: FakeRay, quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, said = run(quick_path, monkeypatch, do, device="cuda")
    assert said == ["no node of the Ray cluster has 1 CPU and 1 GPU for a job; waiting for one"]


def test_a_cluster_that_is_connected_already_stays_so(
    ray: FakeRay, quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray.given = {"by": "the user"}
    run(quick_path, monkeypatch, do)
    assert ray.given == {"by": "the user"}


def test_a_node_that_is_lost_is_said(
    ray: FakeRay, quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose_one(running: Sequence[Task]) -> None:
        ray.node_names = ["two"]

    def slow(study: Path, seed: int) -> tuple[int, str]:
        threading.Event().wait(0.2)
        return do(study, seed)

    _, said = run(quick_path, monkeypatch, slow, watch=lose_one)
    assert said == ["a node of the Ray cluster is lost, 1 left: its jobs begin again elsewhere"]


def test_a_worker_that_was_killed_is_begun_again_as_often_as_asked_for(
    ray: FakeRay, quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def killed(study: Path, seed: int) -> tuple[int, str]:
        calls.append(seed)
        leave(study, seed, trunk="done", sgd="interrupted")
        return (-9, "") if len(calls) < 3 else do(study, seed)

    tasks = tasks_of_sweep(quick_path, seeds=1)[::2]
    outcome, said = run(quick_path, monkeypatch, killed, tasks, retries=1)
    assert said == ["first seed 0: its worker was killed; begun again (1 of 1)"]
    assert (len(calls), outcome.exit_code) == (2, 75)
    assert outcome.endings[tasks[1]].killed
    outcome, _ = run(quick_path, monkeypatch, killed, tasks, retries=1)
    assert (len(calls), outcome.exit_code) == (3, 0)


def test_runs_say_how_they_ended(
    ray: FakeRay, quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverges(study: Path, seed: int) -> tuple[int, str]:
        leave(study, seed, trunk="done", sgd="diverged")
        return 3, ""

    tasks = [Task(0, "trunk"), Task(0, "sgd"), Task(0, "next", after="sgd")]
    outcome, _ = run(quick_path, monkeypatch, diverges, tasks)
    assert [outcome.endings[task].exit_code for task in tasks[:2]] == [0, 3]
    assert (outcome.left_out, outcome.exit_code) == (tasks[2:], 3)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (None, 2, "thalweg: plugin 'mine.py': no such file"),
        (RayTaskError("ray::run_worker()\nNo module named 'thalweg'\n"), 1, "No module named"),
        (RayError("The task's node died too often.\nMore"), 75, "The task's node died too often."),
    ],
)
def test_what_goes_wrong_before_any_run_is_said_of_the_first(
    ray: FakeRay,
    quick_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception | None,
    code: int,
    message: str,
) -> None:
    def fails(study: Path, seed: int) -> tuple[int, str]:
        if error is not None:
            raise error
        return code, f"planning\n{message}"

    tasks = [Task(0, "trunk"), Task(0, "sgd")]
    outcome, _ = run(quick_path, monkeypatch, fails, tasks)
    ending = outcome.endings[tasks[0]]
    assert (ending.exit_code, outcome.exit_code, outcome.left_out) == (code, code, tasks[1:])
    assert message in ending.message


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_request_to_stop_cancels_the_tasks_and_a_second_one_ends_them_by_force(
    ray: FakeRay, quick_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    def stop(running: Sequence[Task]) -> None:
        if not ray.tasks[0].cancelled:
            signal.raise_signal(number)
            signal.raise_signal(number)

    def works(study: Path, seed: int) -> tuple[int, str]:
        leave(study, seed, trunk="running")
        while len(ray.tasks) < 2 or len(ray.tasks[seed].cancelled) < 2:
            threading.Event().wait(0.01)
        leave(study, seed, trunk="interrupted")
        return 75, ""

    tasks = tasks_of_sweep(quick_path)
    before = signal.getsignal(number)
    outcome, said = run(quick_path, monkeypatch, works, tasks, watch=stop, retries=3)
    assert [task.cancelled for task in ray.tasks] == [[False, True], [False, True]]
    assert (outcome.interrupted, outcome.exit_code, said) == (True, 75, [])
    begun = [task for task in tasks if task.study == quick_path / "first"]
    assert list(outcome.endings) == [task for task in begun if task.branch == "trunk"]
    assert not any(ending.killed for ending in outcome.endings.values())
    assert len(outcome.left_out) == len(tasks) - 2
    assert signal.getsignal(number) is before


def test_the_runs_that_are_at_work_are_watched(
    ray: FakeRay, quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched: list[Task] = []
    task = Task(0, "trunk")

    def works(study: Path, seed: int) -> tuple[int, str]:
        folder = StudyFolder(study).run(seed, "trunk").create("seed = 0\n")
        with folder.locked():
            folder.write_status(Status("running"))
            while not watched:
                threading.Event().wait(0.01)
        return do(study, seed)

    run(quick_path, monkeypatch, works, [task, Task(0, "sgd")], watch=watched.extend)
    assert set(watched) == {task}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"gpu": 1}, r"option of executor 'ray': got 'gpu', allowed: .*did you mean 'gpus'\?"),
        ({"gpus": "1.5"}, "gpus of executor 'ray': got '1.5', allowed: 0 to 1, or a whole number"),
        ({"gpus": "nan"}, "gpus of executor 'ray': got 'nan'"),
        ({"gpus": "inf"}, "gpus of executor 'ray': got 'inf'"),
        ({"restarts": "-1"}, "restarts of executor 'ray': got '-1', allowed: an integer >= 0"),
    ],
)
def test_options_that_cannot_be_are_refused(
    ray: FakeRay,
    quick_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, object],
    said: str,
) -> None:
    with pytest.raises(InvalidInput, match=said):
        run(quick_path, monkeypatch, do, options=options)
    assert ray.tasks == []


def test_without_ray_it_says_how_to_install_it(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r'pip install "thalweg\[ray\]"'):
        run(quick_path, monkeypatch, do)
