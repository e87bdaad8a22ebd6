"""What a person sees while a study runs: on a terminal, in a file, when something goes wrong."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from tests.lab.small_study import begin, small_spec
from thalweg.lab.execution.processes import Ending
from thalweg.lab.execution.schedule import Outcome, Task, tasks_of
from thalweg.lab.problem_facts import ProblemFacts
from thalweg.lab.progress import Progress, TimeLeft, duration, time_left
from thalweg.lab.store import StudyFolder
from thalweg.lab.store.status import Status

FACTS = ProblemFacts(
    num_parameters=1000,
    num_samples=200,
    k=10,
    optimizer_vectors=1,
    vectorize_up_to=0,
    chunk_size=256,
    fingerprint="",
)
TRUNK, SGD, DOM = Task(0, "trunk"), Task(0, "sgd"), Task(0, "dom-sgd")


def begun(
    folder: Path, *, terminal: bool = False, width: int = 80
) -> tuple[Progress, io.StringIO, StudyFolder]:
    spec = small_spec()
    study = begin(folder / "study", spec)
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=width, color_system=None)
    progress = Progress(console)
    progress.begin(study, spec, tasks_of(spec), FACTS, 2, ["mine.py"], "room enough")
    return progress, text, study


def test_plain_lines_say_what_begins_and_what_is_done(quick_path: Path) -> None:
    progress, text, study = begun(quick_path)
    study.run(0, "trunk").write_status(Status("done", step=12, loss=0.25, seconds=3.2))
    progress.show([SGD])
    progress.show([SGD])
    progress.end(Outcome({TRUNK: Ending(0)}))
    lines = text.getvalue().splitlines()
    assert lines[:2] == [
        "P = 1,000 parameters, N = 200 samples, k = 10",
        "room enough",
    ]
    assert lines[2] == "4 runs, 2 at a time"
    assert lines[3] == "seed 0 trunk: done at step 12, loss 0.25, 3 s"
    assert lines[4].startswith("took ")
    assert len(lines) == 5


def test_what_ended_badly_is_said_once_with_its_log_and_how_to_go_on(quick_path: Path) -> None:
    progress, text, study = begun(quick_path)
    begin_of_end = len(text.getvalue())
    outcome = Outcome(
        {TRUNK: Ending(0), SGD: Ending(3, "loss\nis nan"), DOM: Ending(1, "no memory")},
        left_out=[],
    )
    progress.end(outcome)
    lines = text.getvalue()[begin_of_end:].splitlines()
    assert lines[:3] == [
        f"seed 0 sgd: diverged: loss is nan; see {study.run(0, 'sgd').path / 'log.txt'}",
        f"seed 0 dom-sgd: failed: no memory; see {study.run(0, 'dom-sgd').path / 'log.txt'}",
        f"to continue: thalweg resume {study.path} --plugin mine.py",
    ]


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_live_table_fits_the_terminal_and_shows_the_time_left(
    quick_path: Path, width: int
) -> None:
    progress, _, study = begun(quick_path, terminal=True, width=width)
    try:
        run = study.run(0, "dom-sgd")
        with run.locked():
            run.write_status(
                Status(
                    "running",
                    step=18,
                    end_step=24,
                    seconds=6.0,
                    loss=0.1234,
                    alignment=0.987,
                    sharpness=12.5,
                )
            )
            statuses = {task: study.run(0, task.branch).status() for task in (TRUNK, SGD, DOM)}
        drawn = io.StringIO()
        Console(file=drawn, width=width, color_system=None).print(
            progress.table([SGD, DOM], statuses)
        )
    finally:
        progress.stop()
    lines = drawn.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert "runs done, more than 6 s left" in " ".join(" ".join(lines).split())
    assert any("seed 0" in line for line in lines)
    if width >= 80:
        assert any(line.split()[2:5] == ["dom-sgd", "18", "24"] for line in lines)


def test_the_time_left_goes_by_the_runs_own_rates() -> None:
    spec = small_spec()
    statuses = dict.fromkeys(tasks_of(spec), Status("done", step=24, end_step=24, seconds=24.0))
    assert time_left(spec, statuses, 2, 200) == TimeLeft(0.0, is_all=True)
    # Half of 12 steps in 6 seconds: 6 seconds more.
    statuses[SGD] = Status("running", step=18, end_step=24, seconds=6.0)
    assert time_left(spec, statuses, 2, 200) == TimeLeft(6.0, is_all=True)
    statuses[DOM] = Status("diverged", step=18, end_step=24, seconds=6.0)
    assert time_left(spec, statuses, 2, 200) == TimeLeft(6.0, is_all=True)


def test_a_run_that_waits_goes_at_the_rate_of_its_kind_in_other_seeds() -> None:
    spec = small_spec({"seeds": [0, 1]})
    statuses = dict.fromkeys(tasks_of(spec), Status("done", step=24, end_step=24, seconds=24.0))
    statuses[Task(1, "sgd")] = None
    assert time_left(spec, statuses, 2, 200) == TimeLeft(24.0, is_all=True)


def test_nothing_is_said_before_a_rate_is_known_and_at_least_before_all_are() -> None:
    spec = small_spec()
    statuses: dict[Task, Status | None] = dict.fromkeys(tasks_of(spec))
    assert time_left(spec, statuses, 2, 200) is None
    # A first solve of a second is no rate.
    statuses[TRUNK] = Status("running", step=6, end_step=12, seconds=1.0)
    assert time_left(spec, statuses, 2, 200) is None
    statuses[TRUNK] = Status("running", step=6, end_step=12, seconds=6.0)
    left = time_left(spec, statuses, 2, 200)
    assert left == TimeLeft(6.0, is_all=False)
    assert str(left) == "more than 6 s"


def test_a_run_that_has_hardly_begun_has_no_rate_of_its_own() -> None:
    spec = small_spec({"branches.sgd.steps": 1000})
    statuses = dict.fromkeys(tasks_of(spec), Status("done", step=24, end_step=24, seconds=2.4))
    # Its first solve took 5 seconds; going by it, 999 steps would take more than an hour.
    statuses[SGD] = Status("running", step=13, end_step=1012, seconds=5.0)
    assert time_left(spec, statuses, 2, 200) == TimeLeft(0.0, is_all=False)


def test_a_trunk_in_its_first_phase_has_not_made_all_its_steps() -> None:
    phase = {"optimizer": {"name": "sgd", "lr": 0.1}, "batch_size": 20, "steps": 100}
    phases = [{**phase, "name": "one"}, {**phase, "name": "two"}]
    spec = small_spec({"phases": phases, "branches": {}})
    statuses = {TRUNK: Status("running", step=50, end_step=None, seconds=50.0)}
    assert time_left(spec, statuses, 1, 200) == TimeLeft(150.0, is_all=True)


def test_a_silent_one_says_nothing_and_a_quiet_one_only_what_went_wrong(
    quick_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = small_spec()
    study = begin(quick_path / "study", spec)
    for progress in (Progress.silent(), Progress.to_stderr(quiet=True)):
        progress.begin(study, spec, tasks_of(spec), FACTS, 2)
        progress.show([TRUNK])
        progress.say("a word")
        progress.end(Outcome({TRUNK: Ending(0)}))
    assert capsys.readouterr() == ("", "")
    progress = Progress.to_stderr(quiet=True)
    progress.begin(study, spec, tasks_of(spec), FACTS, 2)
    progress.end(Outcome({TRUNK: Ending(2, "bad")}, left_out=[SGD]))
    said = capsys.readouterr()
    assert said.out == ""
    assert [line.partition(": ")[0] for line in said.err.splitlines()] == [
        "seed 0 trunk",
        "seed 0 sgd",
        "to continue",
    ]


def test_durations_are_for_people() -> None:
    assert [duration(s) for s in (0.4, 45, 89, 150, 4800)] == [
        "0 s",
        "45 s",
        "89 s",
        "2 min",
        "80 min",
    ]
    assert duration(7200) == "2 h 0 min"
