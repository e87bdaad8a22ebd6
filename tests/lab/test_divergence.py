"""A run that diverges, from its first step or before it, is its own affair."""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.lab.small_study import small_spec
from thalweg.lab import preparing
from thalweg.lab import study as study_module
from thalweg.lab.config import Spec
from thalweg.lab.execution.processes import Ending
from thalweg.lab.execution.schedule import Outcome, Task
from thalweg.lab.problem_facts import MOST_VECTORS, examine_here
from thalweg.lab.progress import Progress
from thalweg.lab.study import StudyResult, run
from thalweg.lab.training import building

SHORT: dict[str, Any] = {
    "seeds": [0, 1],
    "phases.0.steps": 3,
    "branches": {"sgd": {"steps": 3}},
    "probes": {"loss": 1},
}


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The problem is examined here, and nothing is made of the measurements."""
    monkeypatch.setattr(
        preparing, "examine", lambda spec, plugins, device, **_: examine_here(spec, plugins, device)
    )
    monkeypatch.setattr(
        study_module, "conclude", lambda study, spec, outcome: StudyResult(study, {}, outcome)
    )


def poison(monkeypatch: pytest.MonkeyPatch, *seeds: int) -> None:
    """The initial parameters of these seeds are no numbers."""
    build = building.build_problem

    def poisoned(spec: Any, seed: int, *more: Any) -> Any:
        problem = build(spec, seed, *more)
        if seed in seeds:
            with torch.no_grad():
                next(problem.model.parameters()).fill_(torch.nan)
        return problem

    monkeypatch.setattr(building, "build_problem", poisoned)


def told(spec: Spec, root: Path) -> tuple[StudyResult, list[str]]:
    text = io.StringIO()
    progress = Progress(Console(file=text, width=500))
    return run(spec, root=root, executor="inline", progress=progress), text.getvalue().splitlines()


@pytest.mark.usefixtures("in_this_process")
def test_what_diverges_in_the_rehearsal_belongs_to_its_run_and_the_other_seed_goes_on(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, 0)
    result, lines = told(small_spec(SHORT), quick_path)
    codes = {str(task): ending.exit_code for task, ending in result.outcome.endings.items()}
    assert codes == {"seed 0 trunk": 3, "seed 1 trunk": 0, "seed 1 sgd": 0}
    assert result.exit_code == 3
    trunk = result.study.run(0, "trunk")
    status = trunk.status()
    assert status is not None
    assert (status.state, status.message[:11]) == ("diverged", "at step 0: ")
    said = f"seed 0 trunk: diverged: {status.message}; see {trunk.path / 'log.txt'}"
    assert said in lines
    again = "what would diverge again with these settings (a lower lr?): seed 0 trunk"
    assert again in lines
    assert not [line for line in lines if line.startswith("to continue")]


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("k", [3, "gap"])
def test_where_every_seed_diverges_each_run_says_so(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch, k: int | str
) -> None:
    poison(monkeypatch, 0, 1)
    free = {"problem.chunk_size": None, "problem.vectorize_up_to": None, "subspace.k": k}
    result, _ = told(small_spec({**SHORT, **free}), quick_path)
    assert {ending.exit_code for ending in result.outcome.endings.values()} == {3}
    states = [run.status().state for run in result.study.runs() if run.status()]  # type: ignore[union-attr]
    assert states == ["diverged", "diverged"]


def test_a_step_of_the_rehearsal_that_diverges_is_guessed_at() -> None:
    sam = {"name": "sam", "lr": 0.1, "rho": 1e30}
    facts = examine_here(small_spec({"phases.0.optimizer": sam}), [], "cpu")
    assert facts.optimizer_vectors == MOST_VECTORS


def test_what_can_continue_is_what_neither_is_done_nor_diverges_again() -> None:
    trunk, a, b, other = Task(0, "trunk"), Task(0, "a"), Task(0, "b", "a"), Task(1, "a")
    diverged = partial(Ending, 3, "nan")
    assert not Outcome({trunk: diverged()}, [a, b]).can_continue
    assert Outcome({trunk: diverged()}, [a, b, other]).can_continue
    assert Outcome({trunk: Ending(0), a: diverged(), other: Ending(75)}, [b]).can_continue
    assert not Outcome({trunk: Ending(0), a: diverged()}, [b]).can_continue
