"""Splits on the Hessian of the very mini-batch that a step trains on."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.dense import flat_loss, flat_parameters, gradient, hessian
from tests.lab.small_study import begin, differing, execute, left, small_spec
from tests.networks import Case
from tests.sampling import few
from thalweg.errors import Interrupted, InvalidInput
from thalweg.lab.config import Spec, dump_spec, parse_spec
from thalweg.lab.training import Run
from thalweg.lab.training.step import minibatch

OWN = {"source": "exact", "samples": "batch"}
K = 3


def spec_of(changes: dict[str, Any]) -> Spec:
    """Bulk-SGD from the initial parameters, in a branch or in the trunk."""
    return small_spec({"dtype": "float64", "subspace.tolerance": 1e-8, **changes})


def expected_step(run: Run, theta: Tensor, rows: Tensor) -> Tensor:
    """theta - lr (I - P) g of these samples, P from the dense Hessian over them."""
    problem = run.setup.problem
    case = Case(problem.model, problem.loss, problem.train)
    loss = flat_loss(case, rows=rows)
    vectors = torch.linalg.eigh(hessian(loss, theta))[1].flip(1)[:, :K]
    slope = gradient(loss, theta)
    return theta - 0.05 * (slope - vectors @ (vectors.T @ slope))


@pytest.mark.parametrize("batch_size", few(1, [20, "all"]))
def test_each_step_loses_the_dominant_part_of_its_own_batch(
    quick_path: Path, batch_size: int | str
) -> None:
    split = {"dominant": 0.0, "bulk": 1.0}
    spec = spec_of(
        {
            "subspace": {"k": K, **OWN, "tolerance": 1e-8},
            "phases.0.split": split,
            "phases.0.batch_size": batch_size,
            "phases.0.steps": 2,
            "problem.model.hidden": [4],
            "checkpoint.every_steps": 1,
            "checkpoint.keep": 9,
        }
    )
    study = begin(quick_path / "study", spec)
    run = Run(spec, study, 0, "trunk")
    problem = run.setup.problem
    theta = flat_parameters(Case(problem.model, problem.loss, problem.train))
    for step in range(2):
        size = problem.num_samples if batch_size == "all" else 20
        theta = expected_step(run, theta, minibatch(0, step, size, problem.num_samples))
    run.execute()
    found = run.setup.objective.theta()
    assert torch.allclose(found, theta, rtol=1e-6, atol=1e-9)


def test_it_costs_the_batchs_share_of_a_solve_over_all_samples(quick_path: Path) -> None:
    split = {"steps": 6, "split": {"dominant": 0.0, "bulk": 1.0}}
    spec = spec_of(
        {
            "branches": {
                "all": {**split, "subspace": {"source": "exact"}},
                "own": {**split, "subspace": OWN},
                "own-thirds": {**split, "subspace": {**OWN, "every": 3}},
            },
            "probes": {"subspace_cost": 6},
        }
    )
    study = begin(quick_path / "study", spec)
    execute(study, spec, "trunk", *spec.branches)
    cost = {
        name: study.run(0, name).read_metrics()["subspace_gradients"].to_pylist()
        for name in spec.branches
    }
    # 20 of 200 samples; batches take a few products more or less.
    assert cost["own"][0] == pytest.approx(0.1 * cost["all"][0], rel=0.5)
    # At the end: the mean over the steps 1 to 5, and the row at the end itself.
    assert 0 < cost["own-thirds"][-1] < 0.6 * cost["own"][-1]


@pytest.mark.parametrize("every", few(1, [3, 1]))
def test_an_interrupted_run_goes_on_bit_for_bit(quick_path: Path, every: int) -> None:
    spec = small_spec(
        {"phases.0.steps": 5, "branches.bulk-sgd.subspace": {"k": K, **OWN, "every": every}}
    )
    whole = begin(quick_path / "whole", spec)
    execute(whole, spec, "trunk", "bulk-sgd")
    study = begin(quick_path / "stopped", spec)
    execute(study, spec, "trunk")
    asked = 0

    def stop_at_the_fifth() -> bool:
        nonlocal asked
        asked += 1
        return asked == 5

    with pytest.raises(Interrupted):
        Run(spec, study, 0, "bulk-sgd", should_stop=stop_at_the_fifth).execute()
    execute(study, spec, "bulk-sgd")
    assert differing(left(study, "bulk-sgd"), left(whole, "bulk-sgd")) == []


@pytest.mark.slow
def test_what_is_measured_leaves_the_trajectory_alone(quick_path: Path) -> None:
    changes = {
        "phases.0.steps": 4,
        "branches.bulk-sgd.steps": 8,
        "branches.bulk-sgd.subspace": {"k": K, **OWN},
    }
    found = []
    for number, probes in enumerate(({"loss": 6}, {"sharpness": 1, "alignment_update": 2})):
        spec = small_spec({**changes, "probes": probes})
        study = begin(quick_path / str(number), spec)
        execute(study, spec, "trunk", "bulk-sgd")
        kept = left(study, "bulk-sgd")
        found.append({key: kept[key] for key in kept if key.startswith("tensor parameters")})
    assert found[0]
    assert differing(*found) == []


def test_a_spec_with_it_is_read_back_exactly() -> None:
    spec = small_spec({"branches.bulk-sgd.subspace": OWN})
    assert spec.of_branch("bulk-sgd").subspace.samples == "batch"
    assert spec.subspace.samples is None
    assert parse_spec(tomllib.loads(dump_spec(spec))) == spec


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subspace.samples": "batch"}, r"subspace.source: got 'tracker', allowed: 'exact' with"),
        ({"subspace": {"source": "next", "samples": "batch"}}, "got 'next', allowed: 'exact' with"),
        ({"subspace.samples": "minibatch"}, "subspace.samples"),
        (
            {"branches.bulk-sgd": {"subspace": OWN, "split": {"bulk": 2.0, "basis": "frozen"}}},
            r"branches.bulk-sgd.split.basis: got 'frozen', allowed: 'live' with",
        ),
        (
            {"subspace": OWN, "phases.0.split": {"bulk": 2.0, "metric": "optimizer"}},
            r"phases.0.split.metric: got 'optimizer', allowed: 'euclidean' with",
        ),
        (
            {"subspace": OWN, "phases.0.local": {"workers": 2, "period": 3}, "branches": {}},
            "each worker has a mini-batch of its own",
        ),
    ],
)
def test_where_there_is_no_such_batch_it_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        small_spec(changes)
