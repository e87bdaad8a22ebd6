from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests import dense
from tests.networks import silu
from thalweg import registry
from thalweg.loss.objective import Objective
from thalweg.measure.step_state import StepState
from thalweg.spectrum.subspace import Subspace
from thalweg.tracking.source import FixedSubspace

PARTS = ("energy_gauss_newton_dominant", "energy_residual_dominant")


@cache
def matrices() -> tuple[Objective, dict[str, Tensor], Tensor]:
    """A loss with both parts, each in full, and the eigenvectors of H, descending."""
    case = silu().to(torch.float64)
    theta = dense.flat_parameters(case)
    hessian = dense.hessian(dense.flat_loss(case), theta)
    gauss_newton = dense.gauss_newton(case, theta)
    vectors = torch.linalg.eigh(hessian)[1].flip(1)
    objective = Objective(case.model, case.loss, case.data)
    return objective, dict(zip(PARTS, (gauss_newton, hessian - gauss_newton), strict=True)), vectors


def measure(state: StepState) -> dict[str, float]:
    row = registry.probes["curvature_energy"].measure(state)
    assert set(row) == set(PARTS)
    return {name: value for name, value in row.items() if isinstance(value, float)}


def state(k: int, step: int = 0) -> StepState:
    objective, _, vectors = matrices()
    source = FixedSubspace(Subspace(vectors[:, :k], torch.ones(k).double()))
    return StepState(step, objective.theta(), objective, source, learning_rate=0.1)


def exact(part: str, k: int) -> float:
    _, both, vectors = matrices()
    projector = vectors[:, :k] @ vectors[:, :k].T
    matrix = both[part]
    return float((projector @ matrix @ projector).norm() ** 2 / matrix.norm() ** 2)


@pytest.mark.parametrize("part", PARTS)
def test_it_is_that_of_the_dense_matrices_where_the_bulk_is_one_direction(part: str) -> None:
    k = len(matrices()[2]) - 1
    measured = measure(state(k))[part]
    assert measured == pytest.approx(exact(part, k), rel=1e-9)


def test_of_all_directions_it_is_one() -> None:
    row = measure(state(len(matrices()[2])))
    assert [row[part] for part in PARTS] == pytest.approx([1.0, 1.0])


@pytest.mark.slow
def test_the_estimate_of_the_denominator_is_unbiased() -> None:
    # Of 1 / share the mean over draws is exact: 60 draws, seen within four standard errors.
    rows = [measure(state(4, step)) for step in range(60)]
    for part in PARTS:
        inverse = np.array([1 / row[part] for row in rows])
        error = inverse.std(ddof=1) / math.sqrt(len(inverse))
        assert 0 < error < 0.05 * inverse.mean()
        assert abs(inverse.mean() - 1 / exact(part, 4)) < 4 * error


def test_it_is_a_function_of_the_step_and_leaves_the_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    assert measure(state(4, 7)) == measure(state(4, 7))
    assert measure(state(4, 7)) != measure(state(4, 8))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_part_that_vanishes_has_no_share() -> None:
    data = (torch.eye(3, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64))
    model = nn.Linear(3, 1, bias=False).double()
    # Without curvature in the loss either part is zero.
    objective = Objective(model, lambda output, target: (output - target).mean(), data)
    source = FixedSubspace(Subspace(torch.eye(3).double()[:, :1], torch.ones(1).double()))
    at = StepState(0, torch.ones(3).double(), objective, source, learning_rate=0.1)
    assert all(math.isnan(value) for value in measure(at).values())
