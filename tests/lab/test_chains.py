"""Branches that start after one another, differ in their subspace, or start from the beginning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from tests.lab.small_study import begin, differing, execute, in_a_process, left, small_spec
from thalweg.errors import InvalidInput
from thalweg.lab.config import Spec
from thalweg.lab.execution.schedule import Task, tasks_of
from thalweg.lab.store.checkpoint import latest_checkpoint, load_checkpoint
from thalweg.lab.training import Run, loop
from thalweg.tracking.tracker import SubspaceTracker

CHAIN: dict[str, Any] = {
    "phases.0.steps": 4,
    "branches": {
        "gd": {"steps": 4, "batch_size": "all"},
        "back": {"starts_from": "gd", "steps": 4, "batch_size": 20},
        "dom-back": {"starts_from": "back", "steps": 3, "split": {"dominant": 1.0, "bulk": 0.0}},
    },
}


def test_a_branch_goes_on_where_the_one_before_it_ends(quick_path: Path) -> None:
    spec = small_spec(CHAIN)
    study = begin(quick_path / "s", spec)
    execute(study, spec, "trunk", "gd", "back", "dom-back")
    steps = [study.run(0, name).read_metrics()["step"].to_pylist() for name in ("gd", "back")]
    assert (steps[0][0], steps[0][-1], steps[1][0], steps[1][-1]) == (4, 8, 8, 12)
    loss = [study.run(0, name).read_metrics()["loss"].to_pylist() for name in ("gd", "back")]
    assert loss[0][-1] == loss[1][0]


def test_a_branch_takes_over_the_settings_of_the_one_before_it() -> None:
    spec = small_spec({**CHAIN, "branches.gd.optimizer.lr": 0.2})
    assert spec.branch_phase("back").optimizer.lr == 0.2
    assert spec.branch_phase("dom-back").batch_size == 20
    part = small_spec({**CHAIN, "branches.gd.optimizer": {"name": "adam", "lr": 0.1}})
    part = small_spec(
        {
            **CHAIN,
            "branches.gd.optimizer": {"name": "adam", "lr": 0.1},
            "branches.back.optimizer.lr": 0.3,
        }
    )
    assert part.branch_phase("dom-back").optimizer.registered_name == "adam"
    assert part.branch_phase("dom-back").optimizer.lr == 0.3


def test_adam_carries_its_moments_along_a_chain(quick_path: Path) -> None:
    spec = small_spec({**CHAIN, "branches.gd.optimizer": {"name": "adam", "lr": 0.01}})
    study = begin(quick_path / "s", spec)
    execute(study, spec, "trunk", "gd")
    run = Run(spec, study, 0, "back")
    run._start_branch()
    steps = {float(state["step"]) for state in run.optimizer.state.values()}
    assert steps == {4.0}


def test_tasks_wait_for_the_run_they_start_after() -> None:
    tasks = {task.branch: task for task in tasks_of(small_spec(CHAIN))}
    assert tasks["gd"].needs == Task(0, "trunk")
    assert tasks["dom-back"].needs == Task(0, "back")


def test_a_branch_whose_start_is_not_done_is_refused(quick_path: Path) -> None:
    spec = small_spec(CHAIN)
    study = begin(quick_path / "s", spec)
    execute(study, spec, "trunk")
    with pytest.raises(InvalidInput, match=r"gd: it has not been begun"):
        execute(study, spec, "back")


@pytest.mark.parametrize(
    ("after", "message"),
    [("nowhere", "starts_from: got 'nowhere'"), ("dom-back", "starts_from: got")],
)
def test_a_branch_that_comes_after_nothing_or_itself_is_refused(after: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        small_spec({**CHAIN, "branches.gd.starts_from": after})


def test_a_trunk_of_no_steps_leaves_the_initial_parameters(quick_path: Path) -> None:
    spec = small_spec({**CHAIN, "phases.0.steps": 0})
    study = begin(quick_path / "s", spec)
    initial = Run(spec, study, 0, "trunk").setup.objective.theta()
    execute(study, spec, "trunk", "gd")
    newest = latest_checkpoint(study.run(0, "trunk").checkpoints)
    assert newest is not None
    kept = [t for n, t in load_checkpoint(newest).tensors.items() if "parameters" in n]
    assert torch.equal(
        torch.cat([t.reshape(-1) for t in kept]).sort().values, initial.sort().values
    )
    assert study.run(0, "gd").read_metrics()["step"].to_pylist()[0] == 0


def test_a_branch_has_its_own_subspace(quick_path: Path) -> None:
    changes = {
        "phases.0.steps": 4,
        **{f"branches.{name}.steps": 4 for name in ("sgd", "dom-sgd", "bulk-sgd")},
        "branches.sgd.subspace.k": 5,
        "branches.dom-sgd.subspace": {"source": "random"},
        "branches.bulk-sgd.subspace": {"samples": 50, "every": 2},
        "subspace.error": 0.02,
    }
    spec = small_spec(changes)
    own = spec.of_branch("sgd").subspace
    assert (own.k, own.error) == (5, 0.02)
    study = begin(quick_path / "s", spec)
    execute(study, spec, "trunk", "sgd", "dom-sgd", "bulk-sgd")
    values = study.run(0, "sgd").read_metrics()["eigenvalues"].to_pylist()
    assert len(values[0]) == 5
    assert Run(spec, study, 0, "bulk-sgd").source.objective.num_samples == 50  # type: ignore[attr-defined]
    cost = study.run(0, "dom-sgd").read_metrics()["subspace_gradients"].to_pylist()
    assert set(cost) - {None} == {0.0}


def test_a_branch_measures_what_the_spec_says_or_it_says_itself(quick_path: Path) -> None:
    changes = {
        "branches.sgd.probes": {"solved_eigenvalues": "off", "norms": 6, "noise": 12},
        "branches.dom-sgd": "unset",
    }
    spec = small_spec(changes)
    study = begin(quick_path / "s", spec)
    execute(study, spec, "trunk", "sgd", "bulk-sgd")
    sgd, bulk = (study.run(0, name).read_metrics() for name in ("sgd", "bulk-sgd"))

    def steps(table: pa.Table, column: str) -> list[int]:
        pairs = zip(table["step"].to_pylist(), table[column].to_pylist(), strict=True)
        return [step for step, value in pairs if value is not None]

    assert "solved_eigenvalues" in bulk.column_names
    assert "solved_eigenvalues" not in sgd.column_names
    assert "noise_norm" not in bulk.column_names
    assert steps(sgd, "gradient_norm_bulk") == [12, 18, 24]
    assert steps(bulk, "gradient_norm_bulk") == [12, 15, 18, 21, 24]
    assert steps(sgd, "noise_norm") == [12, 24]


def test_a_subspace_is_found_once_for_all_branches_and_is_that_each_would_find(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = small_spec(
        {
            "branches.sgd.subspace.k": 5,
            "branches.after": {"starts_from": "bulk-sgd"},
            "phases.0.steps": 4,
            **{f"branches.{name}.steps": 3 for name in ("sgd", "dom-sgd", "bulk-sgd", "after")},
        }
    )
    names = ("trunk", "sgd", "dom-sgd", "bulk-sgd", "after")
    solves: list[str] = []
    solve = SubspaceTracker._solve

    def counted(tracker: SubspaceTracker, *args: Any) -> Any:
        solves.append(name)
        return solve(tracker, *args)

    monkeypatch.setattr(SubspaceTracker, "_solve", counted)
    studies = [begin(quick_path / folder, spec) for folder in ("once", "each")]
    for name in names:
        execute(studies[0], spec, name)
    # Its own source; one for "dom-sgd" and "bulk-sgd"; and the same again.
    assert solves == ["trunk", "trunk", "sgd", "bulk-sgd"]
    monkeypatch.setattr(loop, "found_for_branches", lambda *_: {})
    solves.clear()
    for name in names:
        execute(studies[1], spec, name)
    assert solves == list(names)
    for name in ("sgd", "dom-sgd", "after"):
        assert not differing(left(studies[0], name), left(studies[1], name))


def test_nothing_is_found_where_no_branch_asks_for_it(quick_path: Path) -> None:
    probes = {"displacement": "off", "overlap": "off"}
    spec = small_spec({f"branches.{name}.probes": probes for name in ("sgd", "dom-sgd")})
    assert spec.hands_over_branch_point("trunk")  # "bulk-sgd" does
    assert not spec.hands_over_branch_point("sgd")
    assert not small_spec({"branches.*.probes": probes}).hands_over_branch_point("trunk")
    # What every branch finds for itself, nobody finds for them.
    assert not small_spec({"branches.*.subspace.k": 5}).hands_over_branch_point("trunk")


def test_more_samples_for_the_hessian_than_there_are_is_refused(quick_path: Path) -> None:
    spec = small_spec({"subspace.samples": 201})
    study = begin(quick_path / "s", spec)
    with pytest.raises(InvalidInput, match=r"subspace\.samples: got 201, allowed: at most .* 200"):
        Run(spec, study, 0, "trunk")


OWN_METRIC: dict[str, Any] = {
    "phases.0.optimizer": {"name": "adam", "lr": 0.003},
    "phases.0.steps": 6,
    "branches": {
        "bulk": {"steps": 8, "split": {"dominant": 0.0, "bulk": 1.0, "metric": "optimizer"}},
        "frozen": {
            "steps": 8,
            "split": {"dominant": 0.0, "bulk": 1.0, "metric": "optimizer", "basis": "frozen"},
        },
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("branch", ["bulk", "frozen"])
def test_a_split_in_the_optimizers_metric_goes_on_bit_for_bit(
    quick_path: Path, branch: str
) -> None:
    spec = small_spec(OWN_METRIC)
    whole = begin(quick_path / "whole", spec)
    execute(whole, spec, "trunk", branch)
    parted = begin(quick_path / "parted", spec)
    execute(parted, spec, "trunk")
    child = in_a_process(parted, branch)
    child.kill()
    child.ending()
    run = Run(spec, parted, 0, branch, should_stop=_after(5))
    with pytest.raises(Exception, match="stopped"):
        run.execute()
    execute(parted, spec, branch)
    assert not differing(left(whole, branch), left(parted, branch))


def _after(count: int) -> Any:
    asked = iter(range(1000))
    return lambda: next(asked) >= count


def test_a_spec_knows_what_comes_before_a_branch() -> None:
    spec: Spec = small_spec(CHAIN)
    assert (spec.before("gd"), spec.before("dom-back")) == (None, "back")
