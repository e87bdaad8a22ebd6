from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.contrib.training_jacobian.training_problems import (
    BATCHES,
    HEAVY_BALL,
    Quadratic,
    hessians,
    mlp,
    objective_of,
    rate,
    trained_by_torch,
)
from thalweg.contrib.training_jacobian.training_run import TrainingRun, trained_parameters
from thalweg.errors import Diverged, InvalidInput
from thalweg.loss.objective import Objective
from thalweg.optim.split import SplitUpdate
from thalweg.spectrum.subspace import random_subspace
from thalweg.tracking.source import FixedSubspace

PLANE = random_subspace(3, 2, 0, dtype=torch.float64)


@pytest.mark.parametrize("settings", [{}, HEAVY_BALL], ids=["plain", "heavy ball"])
def test_it_ends_where_sgd_of_torch_does(settings: dict[str, float]) -> None:
    case = mlp().to(torch.float64)
    objective = objective_of(case)
    before = objective.theta()
    run = TrainingRun(objective, BATCHES, rate, **settings)
    for start in (before, before + 0.1):
        expected = trained_by_torch(case, start, **settings)
        assert torch.allclose(trained_parameters(run, start), expected, rtol=1e-12)
        moved = TrainingRun(objective, BATCHES, rate, theta=start, **settings)
        assert torch.allclose(trained_parameters(moved), expected, rtol=1e-12)
    assert torch.equal(objective.theta(), before)
    assert repr(run) == f"TrainingRun({objective}, steps=9)"


@pytest.mark.parametrize("settings", [{}, HEAVY_BALL], ids=["plain", "heavy ball"])
def test_many_runs_at_once_end_where_each_does_by_torch(settings: dict[str, float]) -> None:
    case = mlp().to(torch.float64)
    objective = objective_of(case)
    starts = objective.theta() + torch.tensor([0.0, 0.1, -2.0]).double()[:, None]
    ends = trained_parameters(TrainingRun(objective, BATCHES, rate, **settings), starts)
    for start, end in zip(starts, ends, strict=True):
        expected = trained_by_torch(case, start, **settings)
        assert torch.allclose(end, expected, rtol=1e-10, atol=1e-12)


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
    run, start = TrainingRun(objective, [None] * steps, 0.1), objective.theta()
    inside = trained_parameters(run, within=PLANE.project)
    expected = restricted_by_hand(matrices, start, PLANE.basis, steps)
    assert torch.allclose(inside, expected, rtol=1e-12)
    normal = torch.linalg.svd(PLANE.basis)[0][:, 2:]
    outside = trained_parameters(run, within=PLANE.reject)
    assert torch.allclose(outside, restricted_by_hand(matrices, start, normal, steps), rtol=1e-12)
    both = trained_parameters(
        run,
        start.repeat(2, 1),
        within=lambda rows: torch.stack([PLANE.project(rows[0]), PLANE.reject(rows[1])]),
    )
    assert torch.allclose(both, torch.stack([inside, outside]), rtol=1e-12)


def test_it_is_what_a_split_update_along_the_same_subspace_makes() -> None:
    objective = Objective(Quadratic(), None, (hessians(),))
    settings = {"momentum": 0.9, "weight_decay": 0.05}
    end = trained_parameters(
        TrainingRun(objective, [None] * 6, 0.1, **settings), within=PLANE.reject
    )
    model = objective.model
    assert isinstance(model, Quadratic)
    base = torch.optim.SGD(model.parameters(), lr=0.1, **settings)  # type: ignore[arg-type]
    optimizer = SplitUpdate(base, FixedSubspace(PLANE), dominant=0.0, bulk=1.0)
    for _ in range(6):
        model.theta.grad = objective.gradient()
        optimizer.step()
    assert torch.allclose(end, model.theta, rtol=1e-12)


def test_a_run_of_no_step_is_refused() -> None:
    objective = Objective(Quadratic(), None, (hessians(),))
    with pytest.raises(InvalidInput, match="batches: got 'none'"):
        TrainingRun(objective, [], 0.1)


def test_starts_of_another_shape_are_refused() -> None:
    run = TrainingRun(Objective(Quadratic(), None, (hessians(),)), [None], 0.1)
    with pytest.raises(InvalidInput, match=r"theta: got .*, allowed: \(P,\), or \(R, P\)"):
        trained_parameters(run, run.theta_0.reshape(1, 1, -1))


def test_divergence_of_one_run_is_an_error_and_of_one_among_many_its_own() -> None:
    objective = Objective(Quadratic(), None, (hessians(),))
    run = TrainingRun(objective, [None] * 50, 0.1)
    with pytest.raises(Diverged):
        trained_parameters(TrainingRun(objective, [None] * 50, 1e10))
    # The loss of the second is infinite, its gradient is not.
    starts = run.theta_0 * torch.tensor([[1.0], [1e200]]).double()
    ends = trained_parameters(run, starts)
    assert torch.allclose(ends[0], trained_parameters(run), rtol=1e-12)
    assert bool(ends[1].isnan().all())
