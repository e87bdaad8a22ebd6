"""Runs whose updates are split at a curvature, not on k directions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dense import flat_loss, flat_parameters, hessian
from tests.lab.small_study import begin, differing, execute, left, small_spec
from tests.networks import Case
from tests.sampling import few
from thalweg.errors import Interrupted, InvalidInput
from thalweg.lab.config import dump_spec, parse_spec, spec_hash
from thalweg.lab.tables import parse_toml
from thalweg.lab.training import Run
from thalweg.lab.training.step import minibatch

AT: dict[str, Any] = {"source": "threshold", "threshold": 0.2}
BRANCHES: dict[str, Any] = {
    "branches.dom-sgd.subspace": AT,
    "branches.bulk-sgd.subspace": {
        "source": "threshold",
        "threshold": 0.5,
        "relative_to": "edge",
        "error": 0.1,
    },
    "branches.bulk-sgd.optimizer": {"name": "adam", "lr": 0.01},
    "branches.bulk-sgd.split.metric": "optimizer",
    "problem.model.hidden": [4],
    "phases.0.steps": 4,
    "checkpoint.every_steps": 2,
}


def test_a_step_keeps_the_part_below_the_threshold(quick_path: Path) -> None:
    spec = small_spec(
        {
            "dtype": "float64",
            "subspace": {"k": 3, **AT, "error": 1e-6},
            "phases.0.split": {"dominant": 0.0, "bulk": 1.0},
            "phases.0.steps": 1,
            "problem.model.hidden": [4],
        }
    )
    study = begin(quick_path / "study", spec)
    run = Run(spec, study, 0, "trunk")
    problem = run.setup.problem
    case = Case(problem.model, problem.loss, problem.train)
    theta = flat_parameters(case)
    values, vectors = torch.linalg.eigh(hessian(flat_loss(case), theta))
    tau = 0.2 * float(values[-1])
    rows = minibatch(0, 0, 20, problem.num_samples)
    loss = flat_loss(case, rows=rows)
    moved = theta.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(moved), moved)
    below = 1 - torch.sigmoid((values - tau) / (0.1 * tau))
    run.execute()
    expected = theta - 0.05 * vectors @ (below * (vectors.T @ slope))
    assert torch.allclose(run.setup.objective.theta(), expected, atol=1e-7)


@pytest.mark.parametrize("branch", few(1, ["bulk-sgd", "dom-sgd"]))
def test_an_interrupted_branch_goes_on_bit_for_bit(quick_path: Path, branch: str) -> None:
    spec = small_spec({**BRANCHES, f"branches.{branch}.steps": 6})
    whole, broken = (begin(quick_path / name, spec) for name in ("whole", "broken"))
    for study in (whole, broken):
        execute(study, spec, "trunk")
    execute(whole, spec, branch)
    asked = iter([False] * 3 + [True])
    with pytest.raises(Interrupted):
        Run(spec, broken, 0, branch, should_stop=lambda: next(asked)).execute()
    execute(broken, spec, branch)
    assert differing(left(whole, branch), left(broken, branch)) == []


def test_a_spec_without_a_threshold_has_the_hash_that_it_had() -> None:
    spec = small_spec()
    assert "threshold" not in dump_spec(spec)
    assert "relative_to" not in dump_spec(spec)


def test_a_spec_survives_being_written() -> None:
    spec = small_spec(BRANCHES)
    again = parse_spec(parse_toml(dump_spec(spec), "spec.toml"), source="spec.toml")
    assert again == spec
    assert spec_hash(again) == spec_hash(spec)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"subspace.threshold": 0.1}, "without source = 'threshold'"),
        ({"subspace.relative_to": "edge"}, "without source = 'threshold'"),
        ({"subspace": {**AT, "samples": 50}}, "samples"),
        ({"subspace": {**AT, "threshold": 1.0}}, "below 1"),
        ({"subspace": {**AT, "threshold": -1.0}}, "threshold"),
        ({"subspace": AT, "branches.dom-sgd.split.basis": "frozen"}, "no basis"),
    ],
)
def test_what_cannot_be_meant_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        small_spec(changes)


def test_the_edge_of_adam_needs_its_metric(quick_path: Path) -> None:
    spec = small_spec({**BRANCHES, "branches.bulk-sgd.split.metric": "euclidean"})
    study = begin(quick_path / "study", spec)
    execute(study, spec, "trunk")
    with pytest.raises(InvalidInput, match="optimizer"):
        Run(spec, study, 0, "bulk-sgd").execute()
