from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.dynamics.test_training_jacobian import (
    BATCHES,
    HEAVY_BALL,
    Quadratic,
    hessians,
    mlp,
    objective_of,
    rate,
    trained_by_torch,
)
from thalweg.curvature import FixedSubspace, Objective, random_subspace
from thalweg.dynamics.training_run import trained_parameters
from thalweg.errors import Diverged, InvalidInput
from thalweg.optim import SplitUpdate

PLANE = random_subspace(3, 2, 0, dtype=torch.float64)


@pytest.mark.parametrize("settings", [{}, HEAVY_BALL], ids=["plain", "heavy ball"])
def test_it_ends_where_sgd_of_torch_does(settings: dict[str, float]) -> None:
    case = mlp().to(torch.float64)
    objective = objective_of(case)
    before = objective.theta()
    for start in (before, before + 0.1):
        end = trained_parameters(objective, BATCHES, rate, theta=start, **settings)
        assert torch.allclose(end, trained_by_torch(case, start, **settings), rtol=1e-12)
    assert torch.equal(objective.theta(), before)


def restricted_by_hand(matrices: Tensor, start: Tensor, directions: Tensor, steps: int) -> Tensor:
    """Gradient descent in the coordinates z of theta_0 + Q z, by its closed form.

    z_T = -(I - (I - lr K)^T) K^-1 Q^T H theta_0, with K = Q^T H Q.
    """
    hessian = matrices.mean(0)
    inner = directions.T @ hessian @ directions
    one = torch.eye(len(inner), dtype=inner.dtype)
    left = one - torch.linalg.matrix_power(one - 0.1 * inner, steps)
    z = -left @ torch.linalg.solve(inner, directions.T @ hessian @ start)
    return start + directions @ z


def test_within_a_subspace_of_a_quadratic_it_is_descent_in_its_coordinates() -> None:
    matrices, steps = hessians(), 6
    objective = Objective(Quadratic(), None, (matrices,))
    start = objective.theta()
    inside = trained_parameters(objective, [None] * steps, 0.1, within=PLANE.project)
    expected = restricted_by_hand(matrices, start, PLANE.basis, steps)
    assert torch.allclose(inside, expected, rtol=1e-12)
    normal = torch.linalg.svd(PLANE.basis)[0][:, 2:]
    outside = trained_parameters(objective, [None] * steps, 0.1, within=PLANE.reject)
    assert torch.allclose(outside, restricted_by_hand(matrices, start, normal, steps), rtol=1e-12)


def test_it_is_what_a_split_update_along_the_same_subspace_makes() -> None:
    objective = Objective(Quadratic(), None, (hessians(),))
    settings = {"momentum": 0.9, "weight_decay": 0.05}
    end = trained_parameters(objective, [None] * 6, 0.1, within=PLANE.reject, **settings)
    model = objective.model
    assert isinstance(model, Quadratic)
    base = torch.optim.SGD(model.parameters(), lr=0.1, **settings)  # type: ignore[arg-type]
    optimizer = SplitUpdate(base, FixedSubspace(PLANE), dominant=0.0, bulk=1.0)
    for _ in range(6):
        model.theta.grad = objective.gradient()
        optimizer.step()
    assert torch.allclose(end, model.theta, rtol=1e-12)


def test_what_cannot_be_used_is_refused_and_divergence_is_an_error() -> None:
    objective = Objective(Quadratic(), None, (hessians(),))
    with pytest.raises(InvalidInput, match="batches: got 'none'"):
        trained_parameters(objective, [], 0.1)
    with pytest.raises(Diverged):
        trained_parameters(objective, [None] * 50, 1e10)
