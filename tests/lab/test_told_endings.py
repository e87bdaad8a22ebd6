"""What is said of runs that were killed, stopped, or diverged, and of how to go on."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from tests.lab.small_study import begin, small_spec
from thalweg.lab.execution.processes import Ending
from thalweg.lab.execution.schedule import Outcome, Task, tasks_of
from thalweg.lab.problem_facts import ProblemFacts
from thalweg.lab.progress import Progress

FACTS = ProblemFacts(1000, 200, 10, 1, 0, 256, "")
TRUNK, SGD, DOM = Task(0, "trunk"), Task(0, "sgd"), Task(0, "dom-sgd")
KILLED = Ending.from_outside("its process was ended by SIGKILL")
STOPPED, DIVERGED = Ending(75, "stopped on request at step 4"), Ending(3, "at step 2: nan")


@pytest.mark.parametrize(
    ("outcome", "lines"),
    [
        (
            Outcome({TRUNK: KILLED}, [SGD]),
            [
                "seed 0 trunk: killed: its process was ended by SIGKILL; see RUN/trunk/log.txt",
                "seed 0 sgd: not begun, trunk did not end well",
                "to continue: thalweg resume STUDY",
            ],
        ),
        (
            Outcome({TRUNK: STOPPED}),
            [
                "seed 0 trunk: stopped: stopped on request at step 4; see RUN/trunk/log.txt",
                "to continue: thalweg resume STUDY",
            ],
        ),
        (
            Outcome({TRUNK: STOPPED, SGD: KILLED}, interrupted=True),
            ["to continue: thalweg resume STUDY"],
        ),
        (
            Outcome({TRUNK: Ending(0), SGD: DIVERGED, DOM: DIVERGED}),
            [
                "seed 0 sgd: diverged: at step 2: nan; see RUN/sgd/log.txt",
                "seed 0 dom-sgd: diverged: at step 2: nan; see RUN/dom-sgd/log.txt",
                "what would diverge again with these settings (a lower lr?): seed 0 sgd, seed 0"
                " dom-sgd",
            ],
        ),
    ],
    ids=["killed", "stopped alone", "all stopped", "diverged"],
)
def test_an_ending_is_said_with_what_to_do(
    outcome: Outcome, lines: list[str], quick_path: Path
) -> None:
    spec = small_spec()
    study = begin(quick_path / "study", spec)
    text = io.StringIO()
    progress = Progress(None, Console(file=text, width=500))
    progress.begin(study, spec, tasks_of(spec), FACTS, 2)
    progress.end(outcome)
    run = str(study.path / "seed-0")
    wanted = [line.replace("RUN", run).replace("STUDY", str(study.path)) for line in lines]
    assert text.getvalue().splitlines() == wanted


def test_a_terminal_that_is_gone_ends_no_study(quick_path: Path) -> None:
    spec = small_spec()
    study = begin(quick_path / "study", spec)
    gone = io.StringIO()
    progress = Progress(Console(file=gone))
    gone.close()
    progress.begin(study, spec, tasks_of(spec), FACTS, 2)
    progress.show([TRUNK])
    progress.end(Outcome({TRUNK: Ending(1, "bad")}))
