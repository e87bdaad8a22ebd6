"""What a person sees while a study runs: on a terminal, in a file, when something goes wrong."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from tests.lab.small_study import begin, small_spec
from tests.lab.test_estimate import COSTS, DOM, SGD, TRUNK
from thalweg.lab.processes import Ending
from thalweg.lab.progress import Progress, duration
from thalweg.lab.schedule import Outcome, tasks_of
from thalweg.lab.store import StudyFolder
from thalweg.lab.store.status import Status


def begun(
    folder: Path, *, terminal: bool = False, width: int = 80
) -> tuple[Progress, io.StringIO, StudyFolder]:
    spec = small_spec()
    study = begin(folder / "study", spec)
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=width, color_system=None)
    progress = Progress(console)
    progress.begin(study, spec, tasks_of(spec), COSTS, 2, ["mine.py"], "room enough")
    return progress, text, study


def test_plain_lines_say_what_begins_and_what_is_done(quick_path: Path) -> None:
    progress, text, study = begun(quick_path)
    study.run(0, "trunk").write_status(Status("done", step=12, loss=0.25, seconds=3.2))
    progress.show([SGD])
    progress.show([SGD])
    progress.end(Outcome({TRUNK: Ending(0)}))
    lines = text.getvalue().splitlines()
    assert lines[:2] == [
        "P = 1,000 parameters, N = 200 samples, k = 10; one gradient takes 100.0 ms",
        "room enough",
    ]
    assert lines[2].startswith("4 runs, 2 at a time: about ")
    assert lines[3] == "seed 0 trunk: done at step 12, loss 0.25, 3 s"
    assert lines[4].startswith("took ")
    assert len(lines) == 5


def test_a_range_of_times_is_said_where_the_subspace_decides_and_how_it_was_found(
    quick_path: Path,
) -> None:
    spec = small_spec({"probes": {}, "branches.dom-sgd.steps": 10_000})
    study = begin(quick_path / "study", spec)
    text = io.StringIO()
    counted = replace(COSTS, subspace=replace(COSTS.subspace, counted=True))
    Progress(Console(file=text)).begin(study, spec, [DOM], counted, 1)
    # 10,000 steps of 0.06 s, or of 0.21 s.
    said = "1 run, 1 at a time: about 10 min to 35 min, by how soon the subspace settles"
    assert text.getvalue().splitlines()[-2:] == [
        said,
        "(the subspace's share: counted in products with the Hessian, not measured)",
    ]


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
        f"to go on: thalweg resume {study.path} --plugin mine.py",
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
    assert "runs done, about " in " ".join(lines)
    assert any("seed 0" in line for line in lines)
    if width >= 80:
        assert any(line.split()[2:5] == ["dom-sgd", "18", "24"] for line in lines)


def test_a_silent_one_says_nothing_and_a_quiet_one_only_what_went_wrong(
    quick_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = small_spec()
    study = begin(quick_path / "study", spec)
    for progress in (Progress.silent(), Progress.to_stderr(quiet=True)):
        progress.begin(study, spec, tasks_of(spec), COSTS, 2)
        progress.show([TRUNK])
        progress.say("a word")
        progress.end(Outcome({TRUNK: Ending(0)}))
    assert capsys.readouterr() == ("", "")
    progress = Progress.to_stderr(quiet=True)
    progress.begin(study, spec, tasks_of(spec), COSTS, 2)
    progress.end(Outcome({TRUNK: Ending(2, "bad")}, left_out=[SGD]))
    said = capsys.readouterr()
    assert said.out == ""
    assert [line.partition(": ")[0] for line in said.err.splitlines()] == [
        "seed 0 trunk",
        "seed 0 sgd",
        "to go on",
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
