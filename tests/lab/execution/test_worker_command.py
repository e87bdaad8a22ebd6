"""The command that does a job, and the child process that it is."""

from __future__ import annotations

import _thread
import signal
import sys
import threading
from pathlib import Path

import pytest

from thalweg.errors import InvalidInput
from thalweg.lab.execution.jobs import Job
from thalweg.lab.execution.schedule import Assignment
from thalweg.lab.execution.worker_command import SAID_BYTES, run_worker, worker_arguments
from thalweg.lab.store import StudyFolder

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a stand-in written for bash")


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Have a script in the place of Python."""
    path = folder / "python"
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))


def test_paths_are_those_of_any_folder(quick_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(quick_path)
    plugins = ["mine.py", "mine.problems"]
    means = {"plugins": plugins, "retries": 2, "hung_after": 7.5}
    assignment = Assignment(StudyFolder(Path("runs")), [], 1, "cpu", 1, **means)
    assert worker_arguments(Job(Path("runs/main"), 3), assignment) == [
        *(str(quick_path / "runs" / "main"), "--seed", "3", "--retries", "2"),
        *("--hung-after", "7.5", "--plugin", str(quick_path / "mine.py")),
        *("--plugin", "mine.problems"),
    ]
    with pytest.raises(InvalidInput, match="allowed: one without line breaks"):
        worker_arguments(Job(Path("runs\nmain"), 3), assignment)


def test_status_and_last_words_of_the_child_are_returned(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(quick_path, monkeypatch, 'echo "$OMP_NUM_THREADS $PWD $*"; echo fails >&2; exit 3')
    said = f"2 {quick_path} -m thalweg work runs/main --seed 3\nfails"
    assert run_worker(["runs/main", "--seed", "3"], 2, str(quick_path)) == (3, said)
    stand_in(quick_path, monkeypatch, f"printf '%{2 * SAID_BYTES}s' end")
    assert run_worker([], 1, "/no such folder") == (0, "end")


def test_an_interruption_is_passed_on_and_the_end_waited_for(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = "while true; do sleep 0.05; done"
    stand_in(
        quick_path, monkeypatch, f"trap 'sleep 0.3; echo saved; exit 75' TERM; touch begun; {waits}"
    )

    def interrupt() -> None:
        while not (quick_path / "begun").exists():
            threading.Event().wait(0.01)
        _thread.interrupt_main()

    # Workers of pytest-xdist ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=interrupt).start()
    try:
        assert run_worker([], 1, str(quick_path)) == (75, "saved")
    finally:
        signal.signal(signal.SIGINT, before)
