"""Runs are found by name, described, and compared at a step that all have measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lab.small_study import begin, execute, small_spec
from thalweg.errors import InvalidInput
from thalweg.lab.inspection import ask_to_end_phase, compare, describe, open_run, run_rows
from thalweg.lab.store import StudyFolder


@pytest.fixture
def study(quick_path: Path) -> StudyFolder:
    spec = small_spec({"phases.0.steps": 4, "branches.sgd.steps": 4, "probes": {"loss": 2}})
    study = begin(quick_path / "my-study", spec)
    execute(study, spec, "trunk", "sgd")
    return study


def test_a_run_is_named_by_study_seed_and_branch_or_by_its_path(study: StudyFolder) -> None:
    root = study.path.parent
    for name in ("my-study/seed-0/sgd", "my/seed-0/sgd/", str(study.path / "seed-0" / "sgd")):
        assert open_run(name, root) == study.run(0, "sgd")


def test_an_unknown_run_is_refused_with_the_nearest_name(study: StudyFolder) -> None:
    root = study.path.parent
    with pytest.raises(InvalidInput, match="did you mean 'seed-0/bulk-sgd'"):
        open_run("my-study/seed-0/bulk-sdg", root)
    with pytest.raises(InvalidInput, match="STUDY/seed-N/BRANCH"):
        open_run("my-study", root)


def test_a_study_is_described_by_its_runs_and_a_run_by_its_last_numbers(study: StudyFolder) -> None:
    root = study.path.parent
    described = describe("my-study", root)
    assert described["seed-0/sgd"] == "done at step 8"
    assert described["seed-0/dom-sgd"] == "waiting"
    run = describe("my-study/seed-0/sgd", root)
    assert (run["state"], run["step"]) == ("done", 8)
    assert run["loss"] > 0
    assert describe("my-study/seed-0/dom-sgd", root)["state"] == "waiting"
    assert [row["state"] for row in run_rows(root)] == ["done", "waiting", "waiting", "done"]


def test_runs_are_compared_at_their_last_common_step(study: StudyFolder) -> None:
    names = ["my-study/seed-0/trunk", "my-study/seed-0/sgd"]
    table = compare(names, study.path.parent)
    assert table.loc["step"].tolist() == [4, 4]
    assert table.loc["loss", names[0]] == table.loc["loss", names[1]]
    with pytest.raises(InvalidInput, match="no measured step in common"):
        compare([names[0], "my-study/seed-0/dom-sgd"], study.path.parent)


def test_settings_that_differ_stand_beside_the_runs(study: StudyFolder) -> None:
    root = study.path.parent
    assert not any("settings" in row for row in run_rows(root))
    assert "settings" not in describe("my-study", root)
    phase = {"phases.0.steps": 4, "phases.0.optimizer.lr": 0.1}
    other = small_spec({**phase, "branches.sgd.steps": 4, "probes": {"loss": 2}})
    execute(begin(root / "another", other), other, "trunk")
    settings = {row["run"].split("/")[0]: row["settings"] for row in run_rows(root)}
    assert settings == {"my-study": {"lr": 0.05}, "another": {"lr": 0.1}}
    assert describe("my-study", root)["settings"] == {"lr": 0.05}
    table = compare([f"{name}/seed-0/trunk" for name in settings], root)
    assert table.loc["lr"].tolist() == [0.1, 0.05]
    assert "loss" in table.index
    assert "lr" not in compare(["my-study/seed-0/trunk", "my-study/seed-0/sgd"], root).index


def test_only_a_running_run_can_be_asked_to_end_its_phase(study: StudyFolder) -> None:
    with pytest.raises(InvalidInput, match="it is done; only a running run"):
        ask_to_end_phase("my-study/seed-0/sgd", study.path.parent)
    with pytest.raises(InvalidInput, match="it is not begun"):
        ask_to_end_phase("my-study/seed-0/dom-sgd", study.path.parent)
