from __future__ import annotations

import tomllib
from typing import Any

import pytest

from thalweg.lab.config import PROBLEM_SPECS, builtin_specs, dump_spec, load_spec, parse_spec

NAMES = tuple(builtin_specs())
PROBES = {
    "loss",
    "test",
    "minibatch_loss",
    "sharpness",
    "solved_eigenvalues",
    "alignment_gradient",
    "alignment_minibatch",
    "alignment_update",
    "norms",
    "displacement",
    "effective_learning_rates",
    "overlap",
    "subspace_cost",
    "noise",
    "critical_learning_rates",
}
CLAIMS = {
    "gradient-aligns",
    "dominant-stalls",
    "bulk-suffices",
    "spectrum-gap",
    "bulk-travels",
    "bulk-generalizes",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_built_in_spec_is_valid_and_read_back_exactly(name: str):
    spec = load_spec(name)
    assert parse_spec(tomllib.loads(dump_spec(spec))) == spec


@pytest.mark.parametrize("name", NAMES)
def test_a_built_in_spec_compares_the_three_branches_by_every_probe_and_claim(name: str):
    spec = load_spec(name)
    splits = {branch: spec.branch_phase(branch).split for branch in spec.branches}
    parts = {branch: split and (split.dominant, split.bulk) for branch, split in splits.items()}
    dominant, bulk = (1.0, 0.0), (0.0, 1.0)
    assert parts == {
        "sgd": None,
        "dom-sgd": dominant,
        "bulk-sgd": bulk,
        "dom-sgd-frozen": dominant,
        "bulk-sgd-frozen": bulk,
    }
    assert len({spec.branch_phase(branch).steps for branch in spec.branches}) == 1
    assert set(spec.probes) == PROBES
    assert {use.name for use in spec.claim_uses} == CLAIMS


@pytest.mark.parametrize("name", NAMES)
def test_a_built_in_spec_switches_by_the_papers_rule(name: str):
    (phase,) = load_spec(name).phases
    assert (phase.until_alignment, phase.alignment_ema) == (0.95, 0.9)


@pytest.mark.parametrize(
    "name", [name for name in NAMES if not name.startswith(("digits", "tinyshakespeare"))]
)
def test_the_papers_specs_have_its_20000_steps(name: str):
    spec = load_spec(name)
    trunk, branch = spec.phases[0].steps, spec.branch_phase("sgd").steps
    assert trunk is not None
    assert branch is not None
    assert trunk + branch == 20_000


@pytest.mark.parametrize(
    ("name", "data", "preprocess", "model", "factor", "samples", "lr"),
    [
        ("digits", "digits", "unit", "mlp", 0.5, None, 0.05),
        ("mnist-mlp", "mnist", "unit", "mlp", 0.5, 5000, 0.01),
        ("mnist-mlp-standardized", "mnist", "standardize", "mlp", 0.5, 5000, 0.01),
        ("mnist-mlp-closest-replication", "mnist", "standardize", "mlp", 1.0, 5000, 0.01),
        ("fashion-mnist-mlp", "fashion-mnist", "unit", "mlp", 0.5, 5000, 0.01),
        ("cifar10-cnn", "cifar10", "standardize", "cnn", 0.5, 5000, 0.001),
        ("sst2-transformer", "sst2", "none", "transformer", 0.5, 1000, 0.001),
    ],
)
def test_the_choices_that_set_the_regime(
    name: str, data: str, preprocess: str, model: str, factor: float, samples: Any, lr: float
):
    spec = load_spec(name)
    problem = spec.problem
    assert (problem.data.registered_name, problem.model.registered_name) == (data, model)
    assert (problem.preprocess, problem.samples) == (preprocess, samples)
    assert problem.loss.model_dump() == {"factor": factor}
    assert (spec.phases[0].optimizer.registered_name, spec.phases[0].optimizer.lr) == ("sgd", lr)
    assert spec.phases[0].batch_size == 50


def test_every_problem_means_a_built_in_spec_on_its_data():
    for problem, name in PROBLEM_SPECS.items():
        assert problem.startswith(load_spec(name).problem.data.registered_name)
    assert set(PROBLEM_SPECS.values()) == set(NAMES)


def test_every_built_in_spec_says_what_it_is():
    assert all(builtin_specs().values())
