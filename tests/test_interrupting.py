"""A signal that asks to stop, at any line of a command: 75, one line that says how to go on."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from tests.test_cli import TINY
from thalweg.cli import main
from thalweg.interruption import STOP_SIGNALS
from thalweg.lab import checking, preparing
from thalweg.lab import study as study_module
from thalweg.lab.execution.processes import Ending
from thalweg.lab.execution.schedule import Outcome, Task
from thalweg.lab.problem_facts import ProblemFacts
from thalweg.lab.store import StudyFolder, durable
from thalweg.registry import conclusions

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no such signals")

FACTS = ProblemFacts(910, 200, 3, 0, 0, 256, "0" * 64)


def answer(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, list[str]]:
    """The exit status, and the lines on standard error."""
    capsys.readouterr()
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
    return int(ended.value.code or 0), capsys.readouterr().err.splitlines()


def interrupted(*words: str | Path) -> str:
    command = shlex.join(["thalweg", *map(str, words)])
    return f"thalweg: interrupted; to continue: {command}"


def asks(number: int) -> Callable[..., Any]:
    """In place of a part of the work: somebody asks to stop while it is done."""

    def ask(*_: Any, **__: Any) -> Any:
        signal.raise_signal(number)
        raise AssertionError("goes on")

    return ask


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "my spec.toml"
    path.write_text(tomli_w.dumps({**TINY, "branches": {}, "claims": []}), encoding="utf-8")
    return path


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_before_there_is_a_study_the_same_command_goes_on_and_nothing_is_left(
    number: int,
    spec: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(preparing, "examine", asks(number))
    words = ("run", spec, "--root", tmp_path / "runs", "-q")
    assert answer(capsys, *words) == (75, [interrupted(*words)])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["verdicts", "figures", "report"])
def test_while_it_is_judged_drawn_and_written(
    name: str,
    spec: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from tests.lab.small_study import begin, execute
    from thalweg.lab.config import load_spec

    conclusions.load_built_in()
    study = begin(tmp_path / "runs" / "tiny-0", load_spec(spec))
    execute(study, load_spec(spec), "trunk")
    monkeypatch.setitem(conclusions, name, asks(signal.SIGTERM))
    words = ("report", "tiny", "--root", tmp_path / "runs")
    assert answer(capsys, *words) == (75, [interrupted(*words)])
    assert not list(study.path.glob(f"**/{durable.UNFINISHED}*"))


def test_while_a_study_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    StudyFolder.create(tmp_path, "tiny-0", "")
    monkeypatch.setattr(checking, "check", asks(signal.SIGINT))
    words = ("check", "tiny", "--root", tmp_path)
    assert answer(capsys, *words) == (75, [interrupted(*words)])


def test_while_all_studies_run_the_command_that_does_all_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(study_module, "run", asks(signal.SIGUSR1))
    words = ("reproduce", "--all", "--root", tmp_path, "-q")
    assert answer(capsys, *words) == (75, [interrupted(*words)])


def test_while_a_run_of_one_of_all_studies_goes_on_the_same_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(study: StudyFolder, tasks: list[Task], **_: Any) -> Outcome:
        return Outcome({task: Ending(75) for task in tasks}, interrupted=True)

    monkeypatch.setattr(preparing, "examine", lambda *_, **__: FACTS)
    monkeypatch.setattr(study_module, "run_tasks", stopped)
    words = ("reproduce", "--all", "--root", str(tmp_path), "-q", "--seeds", "0")
    command = shlex.join(["thalweg", *words])
    assert answer(capsys, *words) == (75, [f"to continue: {command}"])


def test_a_request_between_the_last_run_and_the_report_is_one(
    spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = Outcome(interrupted=True)
    monkeypatch.setattr(preparing, "examine", lambda *_, **__: FACTS)
    monkeypatch.setattr(study_module, "run_tasks", lambda *_, **__: done)
    words = ("run", spec, "--root", tmp_path / "runs", "-q")
    said = "thalweg: stopped on request; all runs are done, and the report is left; to continue: "
    assert answer(capsys, *words) == (75, [said + shlex.join(["thalweg", *map(str, words)])])


def test_what_a_library_makes_of_it_is_an_interruption_still(
    spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def importing(*_: Any, **__: Any) -> Any:
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException:
            raise ImportError("numpy failed to import") from None

    monkeypatch.setattr(preparing, "examine", importing)
    words = ("run", spec, "--root", tmp_path / "runs", "-q")
    assert answer(capsys, *words) == (75, [interrupted(*words)])


def test_one_that_is_raised_where_nobody_can_catch_it_is_raised_again(
    spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Destroyed:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    def losing(*_: Any, **__: Any) -> Any:
        Destroyed()
        time.sleep(10)

    monkeypatch.setattr(preparing, "examine", losing)
    words = ("run", spec, "--root", tmp_path / "runs", "-q")
    assert answer(capsys, *words) == (75, [interrupted(*words)])


def test_a_full_disk_says_the_command_that_goes_on(
    spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device", "/tmp/socket")

    monkeypatch.setattr(preparing, "examine", full)
    words = ("run", spec, "--root", tmp_path / "runs", "-q")
    status, (line,) = answer(capsys, *words)
    assert status == 1
    assert line.startswith("thalweg: disk full: /tmp/socket: more room needed, ")
    command = shlex.join(["thalweg", *map(str, words)])
    assert line.endswith(f"; what was saved before is kept: make room, then resume: {command}")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--retries", "-1"], "--retries: got '-1', allowed: an integer >= 0"),
        (["--hung-after", "nan"], "--hung-after: got 'nan', allowed: minutes, or 0 for never"),
        (["--hung-after", "-2"], "--hung-after: got '-2', allowed: minutes, or 0 for never"),
    ],
)
def test_numbers_that_these_settings_cannot_have_are_refused(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, (line,) = answer(capsys, "run", "digits", *words)
    assert status == 2
    assert said in line


class Process:
    """`thalweg` in a process of its own, and of a group of its own."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "thalweg", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=folder,
            start_new_session=True,
        )

    def asked(self, number: int, *, whole_group: bool) -> tuple[int, str]:
        """Its exit status and standard error, once it has been asked to stop."""
        if self.process.poll() is None:
            send = os.killpg if whole_group else os.kill
            send(self.process.pid, number)
        _, err = self.process.communicate(timeout=60)
        return self.process.returncode, err

    def group_is_gone(self) -> bool:
        """Whether no process of the group is left, but those that wait to be reaped."""
        listed = subprocess.run(
            ["ps", "-s", str(self.process.pid), "-o", "stat="], capture_output=True, text=True
        )
        return all(state.startswith("Z") for state in listed.stdout.split())


def test_a_command_that_waits_for_the_problem_ends_with_all_its_processes(
    spec: Path, quick_path: Path
) -> None:
    command = Process(quick_path, "run", str(spec), "--root", "runs")
    assert command.process.stderr is not None
    assert command.process.stderr.readline() == "building the problem ...\n"
    status, err = command.asked(signal.SIGTERM, whole_group=True)
    assert (status, err) == (75, interrupted("run", spec, "--root", "runs") + "\n")
    deadline = time.monotonic() + 20
    while not command.group_is_gone():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert list(quick_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", STOP_SIGNALS)
@pytest.mark.parametrize("whole_group", [True, False])
def test_a_study_that_is_stopped_at_any_time_says_how_to_go_on(
    number: int, whole_group: bool, spec: Path, quick_path: Path
) -> None:
    for tenths in range(1, 60, 8):
        root = str(quick_path / f"runs-{tenths}")
        command = Process(quick_path, "run", str(spec), "--root", root)
        time.sleep(tenths / 10)
        status, err = command.asked(number, whole_group=whole_group)
        assert status in (75, 0), err
        assert "Traceback" not in err
        assert (status == 75) == ("to continue: thalweg " in err), err
        assert not list(Path(root).glob(f"*/{durable.UNFINISHED}*"))
