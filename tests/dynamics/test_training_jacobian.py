from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.curvature.dense import flat_loss, flat_parameters, gradient
from tests.curvature.networks import Case
from thalweg.curvature import Objective
from thalweg.dynamics.training_jacobian import TrainingJacobian, training_jacobian
from thalweg.errors import InvalidInput

BATCHES = [torch.arange(start, start + 4) for start in (0, 4, 7)] * 3
HEAVY_BALL = {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.05}


def rate(step: int) -> float:
    return 0.1 * (1 + math.cos(math.pi * step / len(BATCHES)))


def mlp() -> Case:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2))
    return Case(model, nn.MSELoss(), (torch.randn(11, 2), torch.randn(11, 2)))


@pytest.fixture
def case() -> Case:
    return mlp().to(torch.float64)


def objective_of(case: Case) -> Objective:
    return Objective(case.model, case.loss, case.data, vectorize_up_to=64)


def trained_by_torch(case: Case, start: Tensor, **settings: float) -> Tensor:
    """theta_T of `torch.optim.SGD` from another theta_0: shares no code with what is tested."""
    theta = start.clone()
    optimizer = torch.optim.SGD([theta], lr=1.0, **settings)  # type: ignore[arg-type]
    for step, batch in enumerate(BATCHES):
        theta.grad = gradient(flat_loss(case, rows=batch), theta)
        optimizer.param_groups[0]["lr"] = rate(step)
        optimizer.step()
    return theta


def differences(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """The whole Jacobian by fourth-order central differences, column by column."""

    def central(direction: Tensor, h: float) -> Tensor:
        return (function(at + h * direction) - function(at - h * direction)) / (2 * h)

    unit = torch.eye(len(at), dtype=at.dtype)
    return torch.stack([(4 * central(e, 1e-3) - central(e, 2e-3)) / 3 for e in unit], dim=1)


@pytest.mark.parametrize("settings", [{}, HEAVY_BALL], ids=["plain", "heavy ball"])
def test_it_is_the_derivative_of_the_whole_run_by_differences(
    case: Case, settings: dict[str, float]
) -> None:
    run = training_jacobian(objective_of(case), BATCHES, rate, **settings)
    start = flat_parameters(case)
    end = trained_by_torch(case, start, **settings)
    assert torch.allclose(run.theta_T, end, rtol=1e-10, atol=1e-12)
    assert torch.equal(run.theta_0, start)
    expected = differences(lambda theta: trained_by_torch(case, theta, **settings), start)
    assert torch.allclose(run.columns, expected, atol=1e-8)
    # The run is long enough to matter.
    assert (run.columns - torch.eye(len(start))).norm() > 0.5


class Quadratic(nn.Module):
    """The mean over samples i of (1/2) theta^T H_i theta."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))

    def forward(self, matrices: Tensor) -> Tensor:
        return torch.einsum("i,nij,j->n", self.theta, matrices, self.theta).mean() / 2


def hessians() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(5, 3, 3, generator=generator, dtype=torch.float64)
    return factors @ factors.transpose(1, 2) / 3


def test_on_a_quadratic_it_is_the_product_of_the_steps() -> None:
    matrices, batches = hessians(), [torch.tensor([0, 1]), torch.tensor([2]), None]
    run = training_jacobian(Objective(Quadratic(), None, (matrices,)), batches, 0.1)
    expected = torch.eye(3, dtype=torch.float64)
    for mean in (matrices[:2].mean(0), matrices[2], matrices.mean(0)):
        expected = (torch.eye(3) - 0.1 * mean) @ expected
    assert torch.allclose(run.columns, expected, rtol=1e-12)
    assert torch.allclose(run.theta_T, expected @ run.theta_0, rtol=1e-12)


def test_with_momentum_on_a_quadratic_it_is_a_power_of_the_step_in_theta_and_velocity() -> None:
    matrices, steps, lr, beta, damp = hessians(), 7, 0.1, 0.9, 0.4
    settings = {"momentum": beta, "dampening": damp}
    objective = Objective(Quadratic(), None, (matrices,))
    run = training_jacobian(objective, [None] * steps, lr, **settings)
    one, mean = torch.eye(3, dtype=torch.float64), matrices.mean(0)

    def step(share: float) -> Tensor:
        velocity = torch.cat([share * mean, beta * one], dim=1)
        return torch.cat([torch.cat([one, 0 * one], dim=1) - lr * velocity, velocity])

    expected = torch.linalg.matrix_power(step(1 - damp), steps - 1) @ step(1.0)
    assert torch.allclose(run.columns, expected[:3, :3], rtol=1e-12)


def test_the_size_of_chunks_changes_the_rounding_alone(case: Case) -> None:
    objective = objective_of(case)
    whole = training_jacobian(objective, BATCHES, rate, **HEAVY_BALL, chunk_size=1000)
    for size in (5, 21):
        parts = training_jacobian(objective, BATCHES, rate, **HEAVY_BALL, chunk_size=size)
        assert torch.allclose(parts.columns, whole.columns, rtol=1e-10, atol=1e-12)
        assert torch.allclose(parts.theta_T, whole.theta_T, rtol=1e-12)


def test_given_and_random_directions_are_multiplied_by_the_same_matrix(case: Case) -> None:
    objective = objective_of(case)
    whole = training_jacobian(objective, BATCHES, rate)
    block = torch.arange(3.0 * objective.num_parameters).sin().reshape(-1, 3).double()
    given = training_jacobian(objective, BATCHES, rate, directions=block, chunk_size=2)
    assert torch.allclose(given.columns, whole.columns @ block, atol=1e-10)
    assert whole.directions is None
    drawn = [training_jacobian(objective, BATCHES, rate, directions=4, seed=s) for s in (0, 0, 1)]
    first, again, other = (run.directions for run in drawn)
    assert first is not None
    assert again is not None
    assert other is not None
    assert torch.allclose(first.T @ first, torch.eye(4).double(), atol=1e-12)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    assert torch.allclose(drawn[0].columns, whole.columns @ first, atol=1e-10)


def test_it_starts_where_it_is_told_and_leaves_the_model_as_it_is(case: Case) -> None:
    before = flat_parameters(case).clone()
    start = before + 0.1
    run = training_jacobian(objective_of(case), BATCHES, rate, theta=start, directions=1)
    assert torch.equal(flat_parameters(case), before)
    assert torch.equal(run.theta_0, start)
    assert torch.allclose(run.theta_T, trained_by_torch(case, start), rtol=1e-10, atol=1e-12)
    assert repr(run) == f"TrainingJacobian(P={len(start)}, directions=1)"


def test_float32_agrees_with_float64_to_its_rounding() -> None:
    runs: list[TrainingJacobian] = []
    for dtype in (torch.float32, torch.float64):
        objective = objective_of(mlp().to(dtype))
        runs.append(training_jacobian(objective, BATCHES, rate, momentum=0.9))
    assert runs[0].columns.dtype == torch.float32
    assert torch.allclose(runs[0].columns.double(), runs[1].columns, atol=1e-4)


def test_what_cannot_be_used_is_refused(case: Case) -> None:
    objective = objective_of(case)
    with pytest.raises(InvalidInput, match="batches: got 'none'"):
        training_jacobian(objective, [], 0.1)
    with pytest.raises(InvalidInput, match="chunk_size: got 0"):
        training_jacobian(objective, BATCHES, 0.1, chunk_size=0)
    for wrong in (torch.ones(objective.num_parameters), torch.ones(3, 2)):
        with pytest.raises(InvalidInput, match="directions: got"):
            training_jacobian(objective, BATCHES, 0.1, directions=wrong.double())
    with pytest.raises(InvalidInput, match="k: got 0"):
        training_jacobian(objective, BATCHES, 0.1, directions=0)
    with pytest.raises(InvalidInput, match="samples: got 11"):
        training_jacobian(objective, [torch.tensor([11])], 0.1)
