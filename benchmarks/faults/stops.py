"""Requests to stop, runs that hang or diverge, clocks that jump."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable

from benchmarks.faults.fault import Attempt, Family
from benchmarks.faults.kills import MOST, at_most, let_run, running_processes
from benchmarks.faults.studies import (
    COUNTER,
    Command,
    Harmed,
    forked,
    here,
    is_polite,
    reference,
    started,
    wait_until,
)

from thalweg.lab.store import StudyFolder

FAMILY = Family("Stopped")
SAME = "resumed, the same"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
IMPORTS = 8.0
"""Seconds of the imports of a command from the shell, its runs' included."""


def stopped_politely(command: Command, number: int, harmed: Harmed) -> None:
    """What a command that was asked to stop has to say.

    Raises:
        AssertionError: it ends otherwise than by 75, or does not say how to go on.
    """
    code = command.wait()
    said = is_polite(command)
    if code == -number and harmed.path is None:
        return  # Python itself was still starting
    assert code in (0, 75), f"signal {number}: exit {code}: {said}"
    assert code == 0 or "to continue" in said, f"signal {number}: {said}"


def asked_to_stop(attempt: Attempt, begin: Callable[..., Command], seconds: float) -> float:
    """Send a signal at a random instant, and go on."""
    harmed = Harmed(attempt)
    number = SIGNALS[attempt.case % len(SIGNALS)]
    command = harmed.begin(start=begin)
    let_run(attempt, command, attempt.chance.uniform(0.0, seconds))
    command.send(number)
    stopped_politely(command, number, harmed)
    return at_most(harmed.recovered(), MOST)


@FAMILY.fault(
    "SIGTERM, SIGUSR1 or SIGINT at a random instant: before the first run, during runs, while"
    " drawing",
    survived="exit 75 and a line that says how to go on, no traceback; " + SAME,
    lost="nothing: each run saves a checkpoint",
    unit="steps again",
)
def asked(attempt: Attempt) -> float:
    return asked_to_stop(attempt, forked, reference().seconds)


@FAMILY.fault(
    "the same from the first instant of the command in a shell, imports included",
    survived="the same; a signal before Python runs Thalweg ends it with nothing written",
    lost="nothing",
    unit="steps again",
)
def asked_from_the_shell(attempt: Attempt) -> float:
    return asked_to_stop(attempt, started, IMPORTS + reference().seconds)


@FAMILY.fault(
    "one of these signals twice within a second",
    survived="exit 75, no traceback; " + SAME,
    lost="steps since the last checkpoint of each run at work",
    unit="steps again",
)
def asked_twice(attempt: Attempt) -> float:
    harmed = Harmed(attempt)
    number = SIGNALS[attempt.case % len(SIGNALS)]
    command = harmed.begin()
    let_run(attempt, command, attempt.chance.uniform(0.0, reference().seconds))
    command.send(number)
    let_run(attempt, command, attempt.chance.uniform(0.0, 1.0) ** 2)
    command.send(number)
    stopped_politely(command, number, harmed)
    return at_most(harmed.recovered(), MOST)


HUNG_AFTER = 0.03
"""Minutes after which a run that shows no sign of life is ended here."""


@FAMILY.fault(
    "a run's process that hangs (SIGSTOP), with `--hung-after` 2 s",
    survived="it is noticed, said and ended after that time, exit 75; " + SAME,
    lost="steps since the last checkpoint of that run",
    unit="steps again",
)
def hung(attempt: Attempt) -> float:
    harmed = Harmed(attempt)
    words = [*harmed.words(), "--hung-after", str(HUNG_AFTER)]
    command = forked(words, attempt.folder / "said.txt")
    wait_until(lambda: bool(running_processes(harmed)), command)
    let_run(attempt, command, attempt.chance.uniform(0.0, reference().seconds / 2))
    victims = running_processes(harmed)
    if victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(attempt.chance.choice(victims), signal.SIGSTOP)
    code = command.wait()
    said = is_polite(command)
    assert code in (0, 75), f"exit {code}: {said}"
    assert code == 0 or ("no sign of life" in said and "thalweg resume" in said), said
    return at_most(harmed.recovered(), MOST)


WILD = '''
"""A network that explodes in the trunk of seed 1: its process's output is the log of that run."""

import os
from torch import nn
from thalweg.registry import models
from thalweg.settings import Settings


class Explode(nn.Module):
    def forward(self, outputs):
        return outputs * 1e30


@models.register("wild-mlp-CASE")
class Wild(Settings):
    def build(self, inputs, outputs):
        wild = "seed-1/trunk" in os.readlink("/proc/self/fd/1")
        last = [Explode()] if wild else []
        return nn.Sequential(nn.Flatten(), nn.Linear(inputs.size, outputs), *last)
'''


@FAMILY.fault(
    "divergence in one seed",
    survived="exit 3 with the run's name; the other seed is done; `check` finds nothing",
    lost="the branches of that seed",
)
def diverged(attempt: Attempt) -> None:
    harmed, plugin = Harmed(attempt), attempt.folder / "wild.py"
    plugin.write_text(WILD.replace("CASE", str(attempt.case)))  # a name is registered once
    model = f'{{name = "wild-mlp-{attempt.case}"}}'
    words = [*harmed.words(plugin), "--problem.model", model]
    command = forked(words, attempt.folder / "said.txt")
    code = command.wait()
    said = is_polite(command)
    assert code == 3, f"exit {code}: {said}"
    assert "seed 1 trunk: diverged" in said, said
    assert harmed.path is not None
    study = StudyFolder(harmed.path)
    states = {(r.seed, r.branch): s.state for r in study.runs() if (s := r.status())}
    assert states[1, "trunk"] == "diverged", states
    assert {state for (seed, _), state in states.items() if seed == 0} == {"done"}, states
    code, out, err = here("check", harmed.path, "--plugin", COUNTER, "--plugin", plugin)
    assert code == 0, f"check: {out} {err}"


CLOCK = '''
"""A clock that jumps by up to a year at every look."""

import datetime, random, time
import thalweg.lab.store.status as status

_time, _chance = time.time, random.Random({case})


def jumping():
    return _time() + _chance.uniform(-3e7, 3e7)


time.time = jumping
status.utc_now = lambda: datetime.datetime.fromtimestamp(
    int(jumping()), datetime.UTC
).isoformat().replace("+00:00", "Z")
'''


@FAMILY.fault(
    "clocks that jump by up to a year, both ways, at every look",
    survived="the study ends with the same numbers; `check` finds nothing",
    lost="nothing",
    unit="steps again",
)
def clocks_jump(attempt: Attempt) -> float:
    harmed, plugin = Harmed(attempt), attempt.folder / "clock.py"
    plugin.write_text(CLOCK.format(case=attempt.case))
    command = harmed.begin(plugin)
    assert command.wait() == 0, command.said
    return at_most(harmed.recovered(), 0)


@FAMILY.fault(
    "the study's process paused (SIGSTOP) for a second and continued",
    survived="the study ends with the same numbers",
    lost="nothing",
    unit="steps again",
)
def paused(attempt: Attempt) -> float:
    harmed = Harmed(attempt)
    command = harmed.begin()
    let_run(attempt, command)
    victims = [command.pid, *running_processes(harmed)]
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for victim in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, number)
        time.sleep(1.0)
    assert command.wait() == 0, command.said
    return at_most(harmed.recovered(), 0)
