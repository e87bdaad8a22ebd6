"""Runs in this process, one after another, and executors of a user's own."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.lab.small_study import begin, small_spec
from thalweg.errors import InvalidInput
from thalweg.lab.execution.processes import Ending
from thalweg.lab.execution.schedule import Assignment, Outcome, Task, run_tasks, tasks_of
from thalweg.lab.store import load

SHORT = {
    "phases.0.steps": 3,
    "branches": {"a": {"steps": 3}, "b": {"steps": 3, "starts_from": "a"}},
}


def inline(path: Path, changes: dict[str, object], **options: object) -> Outcome:
    spec = small_spec({**SHORT, **changes})
    study = begin(path, spec)
    common = {"workers": 1, "device": "cpu", "threads": 1, "executor": "inline", **options}
    return run_tasks(study, tasks_of(spec), **common)  # type: ignore[arg-type]


def test_it_gives_the_numbers_that_processes_give(quick_path: Path) -> None:
    assert inline(quick_path / "here", {}).exit_code == 0
    assert inline(quick_path / "there", {}, executor="local").exit_code == 0
    assert load(quick_path / "here").equals(load(quick_path / "there"))


def test_threads_and_random_numbers_of_this_process_stay(quick_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    inline(quick_path / "study", {"probes": {}}, threads=threads + 1)
    assert torch.equal(torch.rand(2), expected)
    assert torch.get_num_threads() == threads


def test_a_failed_run_leaves_out_what_needs_it(quick_path: Path) -> None:
    spec = small_spec({**SHORT, "seeds": [0, 1], "probes": {"loss": 1}})
    study = begin(quick_path / "study", spec)
    study.run(1, "trunk").write_run_text("seed = 1\nbranch = 'trunk'\ndata_fingerprint = 'other'\n")
    outcome = run_tasks(
        study, tasks_of(spec), workers=2, device="cpu", threads=1, executor="inline"
    )
    assert outcome.left_out == [Task(1, "a"), Task(1, "b", "a")]
    assert outcome.exit_code == 4
    assert "the data has changed" in outcome.endings[Task(1, "trunk")].message
    status = study.run(1, "trunk").status()
    assert status is not None
    assert status.state == "failed"


def test_a_spec_need_not_be_readable_from_the_folder(quick_path: Path) -> None:
    spec = small_spec(SHORT)
    study = begin(quick_path / "study", spec)
    study.write_spec_text("objects = true\n")
    common = {"workers": 1, "device": "cpu", "threads": 1, "spec": spec}
    with pytest.raises(InvalidInput, match="take executor 'inline'"):
        run_tasks(study, tasks_of(spec), executor="local", **common)  # type: ignore[arg-type]
    done = run_tasks(study, tasks_of(spec), executor="inline", **common)  # type: ignore[arg-type]
    assert done.exit_code == 0


def test_a_signal_saves_a_checkpoint_and_leaves_the_rest(quick_path: Path) -> None:
    def stop(running: Sequence[Task]) -> None:
        if list((quick_path / "study").glob("seed-0/trunk/checkpoints/step-*")):
            signal.raise_signal(signal.SIGINT)

    outcome = inline(quick_path / "study", {"phases.0.steps": 100_000, "probes": {}}, watch=stop)
    assert outcome.interrupted
    assert outcome.exit_code == 75
    assert len(outcome.left_out) == 2
    assert len(list((quick_path / "study").glob("seed-0/trunk/checkpoints/step-*"))) >= 1


def test_an_executor_can_be_any_callable(quick_path: Path) -> None:
    def pretend(assignment: Assignment) -> Outcome:
        return Outcome({task: Ending(0) for task in assignment.tasks})

    outcome = inline(quick_path / "study", {}, executor=pretend)
    assert [str(task) for task in outcome.endings] == ["seed 0 trunk", "seed 0 a", "seed 0 b"]


def test_a_name_that_no_executor_has_is_refused(quick_path: Path) -> None:
    with pytest.raises(InvalidInput, match="did you mean 'inline'"):
        inline(quick_path / "study", {}, executor="inlin")
