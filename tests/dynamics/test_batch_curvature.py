from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.curvature import dense
from tests.curvature.networks import Case, silu
from thalweg.curvature import Objective
from thalweg.dynamics.batch_curvature import batch_sharpness
from thalweg.errors import Diverged, InvalidInput


@pytest.fixture
def case() -> Case:
    return silu().to(torch.float64)


@pytest.fixture
def objective(case: Case) -> Objective:
    return Objective(case.model, case.loss, case.data)


def moments(case: Case, rows: object) -> tuple[Tensor, Tensor]:
    """g^T H g and norm(g)^2 of a batch, by double backward."""
    theta = dense.flat_parameters(case)
    loss = dense.flat_loss(case, rows=rows)
    gradient = dense.gradient(loss, theta)
    return gradient @ dense.hessian(loss, theta) @ gradient, gradient @ gradient


def test_the_batch_of_all_samples_gives_the_curvature_along_the_gradient(
    case: Case, objective: Objective
) -> None:
    curvature, square = moments(case, slice(None))
    found = batch_sharpness(objective, objective.num_samples, batches=3)
    assert found.value == pytest.approx(float(curvature / square), rel=1e-9)
    assert found.standard_error < 1e-9 * found.value


def test_batches_of_one_sample_average_to_the_ratio_of_means(
    case: Case, objective: Objective
) -> None:
    every = [moments(case, slice(i, i + 1)) for i in range(objective.num_samples)]
    exact = float(sum(c for c, _ in every) / sum(s for _, s in every))
    found = batch_sharpness(objective, 1, batches=500, seed=3)
    assert abs(found.value - exact) < 3 * found.standard_error
    # Not the mean of ratios, which differs by more than that.
    ratios = float(sum(c / s for c, s in every)) / len(every)
    assert abs(ratios - exact) > 4 * found.standard_error


def test_the_standard_error_is_the_spread_over_draws(objective: Objective) -> None:
    found = [batch_sharpness(objective, 3, batches=16, seed=seed) for seed in range(25)]
    spread = float(torch.tensor([f.value for f in found]).std())
    claimed = sum(f.standard_error for f in found) / len(found)
    assert 0.6 < claimed / spread < 1.5


def test_the_draw_depends_on_the_seed_alone_and_theta_can_be_given(objective: Objective) -> None:
    theta = objective.theta()
    state = torch.get_rng_state()
    first = batch_sharpness(objective, 4, 5, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert batch_sharpness(objective, 4, 5, seed=1, theta=theta) == first
    assert batch_sharpness(objective, 4, 5, seed=2) != first
    assert batch_sharpness(objective, 4, 5, seed=1, theta=2 * theta) != first


def test_a_single_batch_has_no_standard_error(objective: Objective) -> None:
    found = batch_sharpness(objective, 4, batches=1)
    assert math.isfinite(found.value)
    assert math.isnan(found.standard_error)


def test_bad_input_is_refused(objective: Objective) -> None:
    for size in (0, objective.num_samples + 1):
        with pytest.raises(InvalidInput, match=r"batch_size: got .* from 1 to N = 13"):
            batch_sharpness(objective, size)
    with pytest.raises(InvalidInput, match="batches: got 0"):
        batch_sharpness(objective, 4, batches=0)
    with pytest.raises(Diverged):
        batch_sharpness(objective, 4, 1, theta=torch.full_like(objective.theta(), math.nan))
