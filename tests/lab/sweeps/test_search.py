"""A search asks for points, runs them, and tells what came of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from tests.lab.small_study import RAW
from thalweg import lab
from thalweg.analysis.regimes import conclusion
from thalweg.errors import InvalidInput, MissingExtra
from thalweg.lab.execution.schedule import Assignment, Outcome
from thalweg.lab.store import RunFolder, StudyFolder
from thalweg.lab.store.metrics import Column, MetricsWriter
from thalweg.lab.store.status import Status
from thalweg.lab.sweeps.search import search

pytest.importorskip("optuna")
RATES = lab.Range(0.001, 1.0, "log")


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take half of a small sweep's time, and are drawn in `tests/test_sweeping.py`."""
    monkeypatch.setattr(conclusion, "draw_all", lambda *given: conclusion.Pictures([], {}, {}))


@pytest.fixture
def spec(quick_path: Path) -> Path:
    file = quick_path / "small.toml"
    own = {"branches": {"sgd": {"steps": 2}}, "probes": {"loss": 1}, "figures": [], "seeds": [0, 1]}
    file.write_text(tomli_w.dumps({**RAW, **own}))
    return file


def pretending(assignment: Assignment) -> Outcome:
    """An executor that writes a loss for each run: least at a rate of 0.1, and none above 0.5."""
    from thalweg.lab.execution.processes import Ending
    from thalweg.lab.preparing import read_spec

    endings = {}
    for task in assignment.tasks:
        study = assignment.study_of(task)
        rate = read_spec(study).phases[0].optimizer.lr
        pretend(study, assignment.folder_of(task), math.log10(rate / 0.1) ** 2 + task.seed, rate)
        endings[task] = Ending(0)
    return Outcome(endings)


def pretend(study: StudyFolder, run: RunFolder, loss: float, rate: float) -> None:
    columns = [Column("step", "integer"), Column("loss")]
    with MetricsWriter(run.metrics, columns, run.hash) as metrics:
        metrics.log({"step": 1, "loss": loss}, 1)
    run.write_status(Status("diverged" if rate > 0.5 else "done", rows=1, run_hash=run.hash))


def searched(spec: Path, **options: Any) -> Any:
    more = {
        "trials": 4,
        "at_once": 2,
        "root": spec.parent / "runs",
        "executor": pretending,
        **options,
    }
    return search(spec, {"lr": RATES}, **more)


def test_each_trial_is_told_what_came_of_its_point_and_the_same_again(spec: Path) -> None:
    found = searched(spec)
    rates = [trial.point.settings["lr"] for trial in found.trials]
    assert len(set(rates)) == 4
    for trial, rate in zip(found.trials, rates, strict=True):
        expected = math.inf if rate > 0.5 else 0.5 + math.log10(rate / 0.1) ** 2
        assert trial.value == pytest.approx(expected)
    best = min(rates, key=lambda rate: abs(math.log10(rate / 0.1)))
    assert found.best.point.settings["lr"] == best
    again = searched(spec, root=spec.parent / "again")
    assert [trial.point.settings for trial in again.trials] == [
        trial.point.settings for trial in found.trials
    ]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"minimize": "lss"}, "column: got 'lss'"),
        ({"minimize": "loss", "maximize": "loss"}, "one of them"),
        ({"trials": 0}, "integers >= 1"),
    ],
)
def test_what_cannot_be_searched_is_refused(spec: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        searched(spec, **options)
    assert says in str(refused.value)


def test_a_branch_that_there_is_not_is_refused_before_anything_is_planned(spec: Path) -> None:
    with pytest.raises(InvalidInput, match=r"branch: got 'sdg', .* did you mean 'sgd'\?"):
        searched(spec, branch="sdg")
    assert not (spec.parent / "runs").exists()


def test_the_extra_is_named(spec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"thalweg\[optuna\]"):
        searched(spec)
