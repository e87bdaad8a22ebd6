"""The studies of the two toys: what they say agrees with their claims and with theory."""

from __future__ import annotations

import numpy as np
import pytest

from thalweg import registry
from thalweg.lab.config import Spec, load_study
from thalweg.problems.quadratic import Quadratic
from thalweg.problems.quadratic_theory import expected_after_steps, stationary
from thalweg.problems.valley import Valley

STANDARD_ROLES = {"plain", "dominant", "bulk"}


@pytest.mark.parametrize("name", ["valley", "quadratic"])
def test_each_claim_has_a_branch_for_each_role_and_a_probe_for_each_column(name: str) -> None:
    spec = load_study(name)
    assert spec.dtype == "float64"
    for use in spec.claim_uses:
        claim = registry.claims[use.name]
        assert set(use.roles) <= set(claim.needs_roles)
        assert set(claim.needs_roles) <= set(use.roles) | STANDARD_ROLES
        assert len(spec.seeds) >= claim.minimum_seeds


def test_the_valley_is_stable_and_its_samples_are_not_used_up() -> None:
    spec = load_study("valley")
    data, phase = spec.problem.data, spec.phases[0]
    assert isinstance(data, Valley)
    assert phase.steps == 0
    assert phase.optimizer.lr * data.steep < 2
    for branch in spec.branches:
        assert spec.branch_phase(branch).steps == 2 * data.copies
    assert spec.branch_phase("gd").batch_size == "all"


def levels(spec: Spec) -> list[tuple[float, float, float]]:
    """Curvature, noise, and expected squared gradient at the branch point of both parts."""
    data, model, phase = spec.problem.data, spec.problem.model, spec.phases[0]
    assert isinstance(data, Quadratic)
    sizes = (data.dominant, data.dimension - data.dominant)
    found = []
    for size, curvature, offset in zip(
        sizes, (data.steep, data.flat), (data.offset_dominant, data.offset_bulk), strict=True
    ):
        noise = size * (curvature * offset) ** 2
        start = size / data.dimension * (curvature * model.model_dump()["radius"]) ** 2
        assert phase.steps is not None
        end = expected_after_steps(phase.optimizer.lr, curvature, start, noise, phase.steps)
        found.append((curvature, noise, end))
    return found


def test_the_quadratics_trunk_is_stationary_in_the_steep_directions_alone() -> None:
    spec = load_study("quadratic")
    lr = spec.phases[0].optimizer.lr
    steep, flat = levels(spec)
    assert steep[2] == pytest.approx(stationary(lr, *steep[:2]), rel=1e-6)
    assert flat[2] / stationary(lr, *flat[:2]) == pytest.approx(3.5, rel=0.1)


def test_the_quadratics_branches_lie_below_between_and_above_the_critical_rates() -> None:
    spec = load_study("quadratic")
    steep, flat = (2 / (h * (1 + noise / end)) for h, noise, end in levels(spec))
    rates = {
        place: {spec.branch_phase(f"{part}-{place}").optimizer.lr for part in ("dom", "bulk")}
        for place in ("low", "between", "high")
    }
    (low,), (between,), (high,) = rates.values()
    assert low < steep < between < flat < high < 2.0
    assert np.isclose(steep, spec.phases[0].optimizer.lr, rtol=1e-6)


def test_no_batch_of_the_quadratic_comes_again() -> None:
    spec = load_study("quadratic")
    data, phase = spec.problem.data, spec.phases[0]
    assert isinstance(data, Quadratic)
    longest = max(spec.branch_phase(branch).steps or 0 for branch in spec.branches)
    assert phase.batch_size == 1
    assert (phase.steps or 0) + longest < data.components
