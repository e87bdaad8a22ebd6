from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from tests import dense
from tests.networks import Case, silu
from thalweg.errors import Diverged, InvalidInput
from thalweg.loss.objective import Objective
from thalweg.measure.batch_sharpness import batch_sharpness


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


def test_batches_of_one_sample_give_the_ratio_of_means_and_its_standard_error() -> None:
    # (x theta - y)^2 with x = 1 or 3 and residuals of one size: g = 2 x r, H = 2 x^2.
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    inputs = torch.tensor([[1.0], [3.0]], dtype=torch.float64).repeat(10, 1)
    objective = Objective(model, nn.MSELoss(), (inputs, torch.ones_like(inputs)))
    found = batch_sharpness(objective, 1, batches=150, seed=3)
    # 2 (1^4 + 3^4) / (1^2 + 3^2); the mean of ratios would be 2 (1^2 + 3^2) / 2 = 10.
    assert abs(found.value - 16.4) < 3 * found.standard_error
    # g^T H g - 16.4 norm(g)^2 is -57.6 or 57.6, over a mean norm(g)^2 of 20.
    assert found.standard_error == pytest.approx(57.6 / 20 / 150**0.5, rel=0.1)


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
