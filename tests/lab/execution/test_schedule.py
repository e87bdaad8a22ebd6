"""Which run goes when, and what becomes of those that cannot."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.lab.small_study import PLUGIN, begin, small_spec
from thalweg.errors import InvalidInput
from thalweg.lab.execution.processes import Child, Ending, call
from thalweg.lab.execution.schedule import (
    Outcome,
    Task,
    longest_first,
    makespan,
    run_tasks,
    tasks_of,
)
from thalweg.lab.execution.worker import work
from thalweg.lab.store import StudyFolder
from thalweg.registry import load_plugin

TRUNK, SGD, DOM = Task(0, "trunk"), Task(0, "sgd"), Task(0, "dom-sgd")


def test_trunks_come_first_and_branches_need_theirs() -> None:
    spec = small_spec({"seeds": [3, 5], "branches": {"a": {}, "b": {}}})
    tasks = tasks_of(spec)
    assert [str(task) for task in tasks][:3] == ["seed 3 trunk", "seed 5 trunk", "seed 3 a"]
    assert [task.needs for task in tasks[:3]] == [None, None, tasks[0]]
    assert tasks_of(spec, [5]) == [Task(5, "trunk"), Task(5, "a"), Task(5, "b")]


def test_what_most_waits_for_goes_first() -> None:
    spec = small_spec({"branches.dom-sgd.steps": 13})
    ordered = longest_first(spec, [SGD, Task(1, "sgd"), DOM, Task(1, "trunk"), TRUNK], 200)
    # The trunk of seed 1 has the short branch alone to wait for it.
    assert ordered == [TRUNK, Task(1, "trunk"), DOM, SGD, Task(1, "sgd")]


def test_epochs_count_in_steps_and_solves_as_many() -> None:
    # 3 epochs of 200 samples, 20 a step, are 30 steps.
    spec = small_spec({"branches.sgd.epochs": 3, "branches.sgd.steps": "unset"})
    assert SGD.most_steps(spec, 200) == 30
    assert longest_first(spec, [DOM, SGD], 200) == [SGD, DOM]
    solved = {"branches.dom-sgd.subspace": {"source": "exact"}}
    spec = small_spec({"branches.sgd.epochs": 3, "branches.sgd.steps": "unset", **solved})
    assert longest_first(spec, [SGD, DOM], 200) == [DOM, SGD]


def test_branches_wait_for_their_trunk_and_share_the_workers() -> None:
    durations = {TRUNK: 2.0, SGD: 3.0, DOM: 3.0, Task(0, "bulk-sgd"): 3.0}
    assert makespan(durations, 1) == 11.0
    assert makespan(durations, 2) == 8.0
    assert makespan(durations, 3) == 5.0
    assert makespan({}, 2) == 0.0


def test_a_failed_trunk_leaves_its_branches_out_and_no_others(quick_path: Path) -> None:
    load_plugin(PLUGIN)
    short = {"seeds": [0, 1], "phases.0.steps": 2, "branches": {"a": {"steps": 2}}}
    spec = small_spec({**short, "probes": {"loss": 1}})
    study = begin(quick_path / "study", spec)
    study.run(1, "trunk").write_run_text("seed = 1\nbranch = 'trunk'\ndata_fingerprint = 'other'\n")
    seen: set[int] = set()
    outcome = run_tasks(
        study,
        tasks_of(spec),
        workers=2,
        device="cpu",
        threads=1,
        watch=lambda running: seen.add(len(running)),
    )
    assert outcome.left_out == [Task(1, "a")]
    codes = {str(task): ending.exit_code for task, ending in outcome.endings.items()}
    assert codes == {"seed 0 trunk": 0, "seed 1 trunk": 4, "seed 0 a": 0}
    assert "the data has changed" in outcome.endings[Task(1, "trunk")].message
    assert max(seen) <= 2
    assert outcome.exit_code == 4


def test_a_signal_to_the_parent_stops_every_run_with_a_checkpoint(quick_path: Path) -> None:
    spec = small_spec({"phases.0.steps": 100_000, "probes": {"loss": 1000}, "seeds": [0, 1]})
    study = begin(quick_path / "study", spec)

    def stop(running: object) -> None:
        if all(list(study.run(s, "trunk").checkpoints.glob("step-*")) for s in (0, 1)):
            signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    outcome = run_tasks(study, tasks_of(spec), workers=2, device="cpu", threads=1, watch=stop)
    assert signal.getsignal(signal.SIGTERM) is before
    assert outcome.interrupted
    assert outcome.exit_code == 75
    assert {ending.exit_code for ending in outcome.endings.values()} <= {75, 1}
    states = [study.run(seed, "trunk").status() for seed in (0, 1)]
    assert [status.state for status in states if status] == ["interrupted"] * 2
    assert len(outcome.left_out) == 6


def test_tasks_run_in_a_thread_too(quick_path: Path) -> None:
    spec = small_spec({"phases.0.steps": 2, "branches": {}, "probes": {}})
    study = begin(quick_path / "study", spec)
    found: list[Outcome] = []
    thread = threading.Thread(
        target=lambda: found.append(
            run_tasks(study, tasks_of(spec), workers=1, device="cpu", threads=1)
        )
    )
    thread.start()
    thread.join()
    assert found[0].exit_code == 0


def test_an_interruption_after_the_last_run_is_none() -> None:
    outcome = Outcome({Task(0, "trunk"): Ending(0)}, interrupted=True)
    assert outcome.exit_code == 0


def test_a_process_that_is_killed_is_said_to_be(quick_path: Path) -> None:
    child = Child(time.sleep, (60,))
    child.kill()
    ending = child.ending()
    said = "its process was ended by SIGKILL: out of memory, or killed by hand"
    assert (ending.exit_code, ending.message, ending.killed) == (75, said, True)


PARENT = """
import os, pathlib, sys, time
from thalweg.lab.execution.processes import PRELOADED, Child, call

def note_and_sleep(path):
    new = pathlib.Path(path).with_suffix(".new")
    new.write_text(str(os.getpid()))
    new.rename(path)
    time.sleep(300)

if __name__ == "__main__":
    PRELOADED.clear()  # nothing of that is needed
    if sys.argv[2] == "call":
        call(note_and_sleep, (sys.argv[1],))
    Child(note_and_sleep, (sys.argv[1],), grace=float(sys.argv[2])).ending()
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no kill on this system")
@pytest.mark.parametrize("kind", ["call", "1"])
def test_a_process_ends_with_its_parent_even_if_that_is_killed(quick_path: Path, kind: str) -> None:
    script, note = quick_path / "parent.py", quick_path / "pid"
    script.write_text(PARENT, encoding="utf-8")
    parent = subprocess.Popen([sys.executable, script, note, kind])
    assert within(60, note.exists)
    child = int(note.read_text(encoding="utf-8"))
    killed = time.monotonic()
    parent.kill()
    parent.wait()
    assert within(30, lambda: not is_alive(child))
    assert kind == "call" or time.monotonic() - killed >= float(kind), "it has its grace"


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def is_alive(pid: int) -> bool:
    """Whether a process goes on; one that has ended and waits to be reaped does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    try:
        return not state.is_file() or state.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_an_error_crosses_the_process_with_its_class_and_message(quick_path: Path) -> None:
    from thalweg.errors import InvalidInput

    with pytest.raises(InvalidInput, match="one that holds"):
        call(work, (str(quick_path), 0, "trunk", "cpu", 1, ()))


@pytest.mark.skipif(sys.platform == "win32", reason="there is no server to fork from")
def test_what_a_run_writes_with_is_there_when_its_process_starts() -> None:
    # PyArrow imports pandas for its first table, and NumPy's masked arrays for pandas.
    assert call(_missing, (("pandas", "pyarrow.parquet", "numpy.ma", "torch"),)) == []


def _missing(names: tuple[str, ...]) -> list[str]:
    """Those of the modules that are not imported."""
    return [name for name in names if name not in sys.modules]


@pytest.mark.parametrize("executor", ["local", "inline"])
def test_an_executor_without_options_refuses_them(executor: str, tmp_path: Path) -> None:
    said = f"options of executor '{executor}': got 'time', allowed: none"
    means: dict[str, Any] = {"workers": 1, "device": "cpu", "threads": 1}
    with pytest.raises(InvalidInput, match=said):
        run_tasks(StudyFolder(tmp_path), [], executor=executor, options={"time": 1}, **means)
