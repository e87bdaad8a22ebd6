"""Processes that are killed, hang, crash or cannot start; the other runs go on."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.lab.execution.troubles import refuse, send_oneself, trouble
from tests.lab.small_study import begin, small_spec
from thalweg.errors import Interrupted, MissingExtra
from thalweg.lab.execution import local, processes
from thalweg.lab.execution.processes import Child, call
from thalweg.lab.execution.schedule import Outcome, Task, run_tasks, tasks_of
from thalweg.lab.store import RunFolder

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no such signals")

QUICK_MINUTES = 0.03
TRUNK, OTHER, BRANCH = Task(0, "trunk"), Task(1, "trunk"), Task(0, "sgd")
KILLED = "its process was ended by SIGKILL: out of memory, or killed by hand"


def troubled(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
    seeds: tuple[int, ...] = (0, 1),
    **options: Any,
) -> tuple[Outcome, RunFolder, list[str]]:
    """A trunk and a branch of each seed; what becomes of them where seed 0's trunk has trouble."""
    monkeypatch.setattr(local, "work", trouble)
    spec = small_spec({"seeds": list(seeds), "branches": {"sgd": {"steps": 2}}})
    study = begin(folder / "study", spec)
    trunk = study.run(0, "trunk")
    (trunk.path / "kind").write_text(how)
    said: list[str] = []
    means: dict[str, Any] = {"workers": 2, "device": "cpu", "threads": 1, "say": said.append}
    return run_tasks(study, tasks_of(spec), **means, **options), trunk, said


def test_a_killed_run_is_named_the_others_go_on_and_it_is_75(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome, trunk, said = troubled(quick_path, monkeypatch, "SIGKILL 9")
    assert outcome.exit_code == 75
    assert outcome.can_continue
    assert outcome.endings[TRUNK].message == KILLED
    assert outcome.endings[OTHER].exit_code == 0
    assert outcome.left_out == [BRANCH]
    assert said == []
    status = trunk.status()
    assert status is not None
    assert (status.state, status.message) == ("interrupted", KILLED)
    assert f"interrupted: {KILLED}" in (trunk.path / "log.txt").read_text()


def test_a_killed_run_is_begun_again_if_asked_for(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome, _, said = troubled(quick_path, monkeypatch, "SIGKILL 1", retries=1)
    assert outcome.exit_code == 0
    assert outcome.left_out == []
    again = "begun again from its last checkpoint (1 of 1)"
    assert said == [f"seed 0 trunk: killed: {KILLED}; {again}"]


def test_it_is_begun_again_so_often_and_no_more(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome, trunk, said = troubled(quick_path, monkeypatch, "SIGKILL 9", retries=2)
    assert (outcome.exit_code, len(said)) == (75, 2)
    assert (trunk.path / "begun").read_text() == "xxx"


def test_a_crash_is_no_kill_and_is_not_tried_again(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome, _, said = troubled(quick_path, monkeypatch, "SIGSEGV 9", retries=1)
    assert outcome.exit_code == 1
    assert outcome.endings[TRUNK].message == "its process was ended by SIGSEGV, a crash"
    assert said == []


@pytest.mark.parametrize("how", ["SIGSTOP 9", "sleep 9"])
def test_a_run_that_hangs_is_noticed_said_and_ended(
    how: str, quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Alone: so short a time is too short for a sound one on a busy machine.
    outcome, _, _ = troubled(quick_path, monkeypatch, how, (0,), hung_after=QUICK_MINUTES)
    ending = outcome.endings[TRUNK]
    assert (ending.exit_code, ending.killed, outcome.exit_code) == (75, True, 75)
    assert ending.message.startswith("no sign of life for 0.03 min (no step, ")
    assert outcome.left_out == [BRANCH]


@pytest.mark.slow
def test_a_run_that_computes_is_alive_however_long_its_step(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome, _, _ = troubled(quick_path, monkeypatch, "compute 9 15", hung_after=5 * QUICK_MINUTES)
    assert outcome.exit_code == 0


def test_a_request_that_comes_while_a_process_is_begun_reaches_it(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Late(Child):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(local, "Child", Late)
    # It is no run, so it does not hear the request; the second one ends it at once.
    outcome, _, _ = troubled(quick_path, monkeypatch, "sleep 9", watch=_second_request)
    assert outcome.interrupted
    assert outcome.exit_code == 75


def _second_request(running: Sequence[Task]) -> None:
    if running:
        signal.raise_signal(signal.SIGTERM)


def test_where_no_process_can_be_started_the_study_ends_with_75(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Child:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(local, "Child", refuse)
    outcome, _, _ = troubled(quick_path, monkeypatch, "sleep 9")
    assert outcome.exit_code == 75
    assert "no process could be started for it" in outcome.endings[TRUNK].message


def test_a_callback_that_fails_ends_no_run(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise BrokenPipeError

    outcome, _, _ = troubled(quick_path, monkeypatch, "compute 9 0", watch=broken)
    assert outcome.exit_code == 0


def test_what_is_called_before_the_runs_may_be_killed_or_hang_too() -> None:
    with pytest.raises(Interrupted, match="ended by SIGKILL"):
        call(send_oneself, ("SIGKILL",))
    with pytest.raises(Interrupted, match=r"no sign of life for 0\.03 min"):
        call(send_oneself, ("SIGSTOP",), hung_after=QUICK_MINUTES)


def test_an_error_of_ones_own_class_is_what_it_derives_from() -> None:
    with pytest.raises(MissingExtra, match="no such package") as caught:
        call(refuse, ())
    assert caught.value.exit_code == 2


def test_a_process_that_not_even_a_kill_ends_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    # Such as one that waits for a dead disk; here, one whose kill is lost.
    monkeypatch.setattr(processes, "UNKILLABLE_SECONDS", 0.1)
    child = Child(time.sleep, (100,))
    end = child._process.kill
    try:
        monkeypatch.setattr(child._process, "kill", lambda: None)
        child.kill("hangs")
        time.sleep(0.15)
        assert not child.is_running
        ending = child.ending()
        assert (ending.exit_code, ending.message, ending.killed) == (75, "hangs", True)
        assert child._process not in multiprocessing.active_children()
    finally:
        end()
        child._process.join()
