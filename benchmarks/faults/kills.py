"""Processes that are killed: the study's, a run's, all of them, at any instant or operation."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Literal

from benchmarks.faults.fault import Attempt, Family
from benchmarks.faults.operations import Harm, armed
from benchmarks.faults.studies import (
    CHECKPOINT_EVERY,
    WORKERS,
    Command,
    Harmed,
    forked,
    is_polite,
    reference,
    wait_until,
)

from thalweg.errors import ThalwegError
from thalweg.lab.store import StudyFolder

FAMILY = Family("Killed")
SAME = "resumed, the same"
SINCE_CHECKPOINT = "steps since the last checkpoint of each run at work"
MOST = WORKERS * (CHECKPOINT_EVERY + 1)
"""Steps that two runs can have made since their last checkpoints, with the rows at both ends."""


def moment(attempt: Attempt) -> float:
    """A random instant of the study, in seconds from its start."""
    return attempt.chance.uniform(0.0, reference().seconds)


def let_run(attempt: Attempt, command: Command, seconds: float | None = None) -> bool:
    """Let the command run to a random instant; whether it is still at work then."""
    end = time.monotonic() + (moment(attempt) if seconds is None else seconds)
    return not wait_until(lambda: time.monotonic() >= end, command) or command.exit_code is None


def running_processes(harmed: Harmed) -> list[int]:
    """The numbers of the processes of runs that are at work."""
    found = []
    for run in StudyFolder(harmed.path).runs() if harmed.path else []:
        try:
            status = run.status()
        except ThalwegError:
            continue
        if status is not None and status.state == "running":
            found.append(status.pid)
    return found


def kill(number: int) -> None:
    """End a process at once, if it is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(number, signal.SIGKILL)


def at_most(lost: float, most: float) -> float:
    """What was lost, if it is not more than what is promised."""
    assert lost <= most, f"{lost} steps were made twice, more than {most}"
    return lost


@FAMILY.fault(
    "the study's process, SIGKILL at a random instant",
    survived=SAME,
    lost="nothing that was measured: its runs notice and save a checkpoint",
    unit="steps again",
)
def study_killed(attempt: Attempt) -> float:
    harmed = Harmed(attempt)
    command = harmed.begin()
    let_run(attempt, command)
    command.send(signal.SIGKILL)
    command.wait()
    return at_most(harmed.recovered(), MOST)


@FAMILY.fault(
    "all processes of a study, SIGKILL at once, three times over",
    survived=SAME,
    lost=SINCE_CHECKPOINT,
    unit="steps again",
)
def all_killed(attempt: Attempt) -> float:
    harmed = Harmed(attempt)
    for number in range(3):
        path = harmed.path
        words = ["resume", path, *harmed.words()[4:]] if path else harmed.words()
        command = forked(words, attempt.folder / f"said-{number}.txt")
        let_run(attempt, command)
        processes = running_processes(harmed)
        command.send(signal.SIGKILL)
        for process in processes:
            kill(process)
        command.wait()
        harmed.settle()
    return at_most(harmed.recovered(), 3 * MOST)


@FAMILY.fault(
    "a run's process, SIGKILL at a random instant",
    survived="the study says which run and how to go on, exit 75; " + SAME,
    lost=SINCE_CHECKPOINT,
    unit="steps again",
)
def worker_killed(attempt: Attempt) -> float:
    harmed = Harmed(attempt)
    command = harmed.begin()
    wait_until(lambda: bool(running_processes(harmed)), command)
    let_run(attempt, command, attempt.chance.uniform(0.0, reference().seconds / 2))
    victims = running_processes(harmed)
    if victims:
        kill(attempt.chance.choice(victims))
    code = command.wait()
    assert code in (0, 75), f"exit {code}: {command.said}"
    if code:
        assert "thalweg resume" in is_polite(command), command.said
    return at_most(harmed.recovered(), MOST)


@FAMILY.fault(
    "the same with `--retries 1`",
    survived="the study says so, begins the run again and ends with 0 and the same numbers",
    lost=SINCE_CHECKPOINT,
    unit="steps again",
)
def worker_killed_and_retried(attempt: Attempt) -> float:
    harmed = Harmed(attempt)
    command = forked([*harmed.words(), "--retries", "1"], attempt.folder / "said.txt")
    wait_until(lambda: bool(running_processes(harmed)), command)
    let_run(attempt, command, attempt.chance.uniform(0.0, reference().seconds / 2))
    victims = running_processes(harmed)
    if victims:
        kill(attempt.chance.choice(victims))
    code = command.wait()
    assert code == 0, f"exit {code}: {is_polite(command)}"
    return at_most(harmed.recovered(), MOST)


@cache
def operations(where: Literal["study", "run"]) -> int:
    """How many operations on files a process of an undisturbed study makes, the busiest one."""
    with tempfile.TemporaryDirectory() as name:
        attempt = Attempt(0, Random(0), Path(name))
        harmed, tally = Harmed(attempt), Path(name) / "tally"
        tally.mkdir()
        harm = Harm("count", str(harmed.root), where=where, tally=str(tally))
        command = harmed.begin(armed(harm, attempt.folder / "fault.py"))
        assert command.wait() == 0, command.said
        return max(path.stat().st_size for path in tally.iterdir())


def harmed_at_an_operation(
    attempt: Attempt, kind: str, where: Literal["study", "run"], lasting: bool = False
) -> tuple[Harmed, Callable[[], str], int]:
    """Let the n-th operation of a process strike; return the study, its words, its exit status."""
    harmed = Harmed(attempt)
    at = attempt.chance.randint(1, operations(where))
    harm = Harm(kind, str(harmed.root), at, lasting, where)
    command = harmed.begin(armed(harm, attempt.folder / "fault.py"))
    code = command.wait()
    return harmed, lambda: f"{kind} at {at}: {is_polite(command)}", code


@FAMILY.fault(
    "the study's process, SIGKILL at its n-th operation on files",
    survived=SAME,
    lost=SINCE_CHECKPOINT,
    unit="steps again",
)
def study_killed_at_operation(attempt: Attempt) -> float:
    harmed, _, code = harmed_at_an_operation(attempt, "kill", "study")
    assert code in (0, -signal.SIGKILL), code
    return at_most(harmed.recovered(), MOST)


@FAMILY.fault(
    "each run's process, SIGKILL at its n-th operation on files",
    survived=SAME,
    lost=SINCE_CHECKPOINT,
    unit="steps again",
)
def run_killed_at_operation(attempt: Attempt) -> float:
    harmed, _, code = harmed_at_an_operation(attempt, "kill", "run")
    assert code in (0, 1, 75), code
    return at_most(harmed.recovered(), len(reference().left) * (CHECKPOINT_EVERY + 1))
