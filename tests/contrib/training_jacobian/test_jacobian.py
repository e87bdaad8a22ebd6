from __future__ import annotations

from collections.abc import Callable

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
from tests.dense import flat_parameters
from tests.networks import Case
from tests.sampling import few
from thalweg.contrib.training_jacobian.jacobian import TrainingJacobian, training_jacobian
from thalweg.contrib.training_jacobian.training_run import TrainingRun
from thalweg.errors import Diverged, InvalidInput
from thalweg.loss.objective import Objective


@pytest.fixture
def case() -> Case:
    return mlp().to(torch.float64)


def differences(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """The whole Jacobian by fourth-order central differences, column by column."""

    def central(direction: Tensor, h: float) -> Tensor:
        return (function(at + h * direction) - function(at - h * direction)) / (2 * h)

    unit = torch.eye(len(at), dtype=at.dtype)
    return torch.stack([(4 * central(e, 1e-3) - central(e, 2e-3)) / 3 for e in unit], dim=1)


@pytest.mark.parametrize("settings", few(1, [HEAVY_BALL, {}]), ids=["plain", "heavy ball"])
def test_it_is_the_derivative_of_the_whole_run_by_differences(
    case: Case, settings: dict[str, float]
) -> None:
    run = training_jacobian(TrainingRun(objective_of(case), BATCHES, rate, **settings))
    start = flat_parameters(case)
    end = trained_by_torch(case, start, **settings)
    assert torch.allclose(run.theta_T, end, rtol=1e-10, atol=1e-12)
    assert torch.equal(run.theta_0, start)
    expected = differences(lambda theta: trained_by_torch(case, theta, **settings), start)
    assert torch.allclose(run.columns, expected, atol=1e-8)
    # The run is long enough to matter.
    assert (run.columns - torch.eye(len(start))).norm() > 0.5


def test_on_a_quadratic_it_is_the_product_of_the_steps() -> None:
    matrices, batches = hessians(), [torch.tensor([0, 1]), torch.tensor([2]), None]
    run = training_jacobian(TrainingRun(Objective(Quadratic(), None, (matrices,)), batches, 0.1))
    expected = torch.eye(3, dtype=torch.float64)
    for mean in (matrices[:2].mean(0), matrices[2], matrices.mean(0)):
        expected = (torch.eye(3) - 0.1 * mean) @ expected
    assert torch.allclose(run.columns, expected, rtol=1e-12)
    assert torch.allclose(run.theta_T, expected @ run.theta_0, rtol=1e-12)


def test_with_momentum_on_a_quadratic_it_is_a_power_of_the_step_in_theta_and_velocity() -> None:
    matrices, steps, lr, beta, damp = hessians(), 7, 0.1, 0.9, 0.4
    settings = {"momentum": beta, "dampening": damp}
    objective = Objective(Quadratic(), None, (matrices,))
    run = training_jacobian(TrainingRun(objective, [None] * steps, lr, **settings))
    one, mean = torch.eye(3, dtype=torch.float64), matrices.mean(0)

    def step(share: float) -> Tensor:
        velocity = torch.cat([share * mean, beta * one], dim=1)
        return torch.cat([torch.cat([one, 0 * one], dim=1) - lr * velocity, velocity])

    expected = torch.linalg.matrix_power(step(1 - damp), steps - 1) @ step(1.0)
    assert torch.allclose(run.columns, expected[:3, :3], rtol=1e-12)


def test_the_size_of_chunks_changes_the_rounding_alone(case: Case) -> None:
    run = TrainingRun(objective_of(case), BATCHES, rate, **HEAVY_BALL)
    whole = training_jacobian(run)
    for size in (5, 21):
        parts = training_jacobian(run, chunk_size=size)
        assert torch.allclose(parts.columns, whole.columns, rtol=1e-10, atol=1e-12)
        assert torch.allclose(parts.theta_T, whole.theta_T, rtol=1e-12)


def test_given_and_random_directions_are_multiplied_by_the_same_matrix(case: Case) -> None:
    run = TrainingRun(objective_of(case), BATCHES, rate)
    whole = training_jacobian(run)
    block = torch.arange(3.0 * len(run.theta_0)).sin().reshape(-1, 3).double()
    given = training_jacobian(run, directions=block, chunk_size=2)
    assert torch.allclose(given.columns, whole.columns @ block, atol=1e-10)
    assert whole.directions is None
    drawn = [training_jacobian(run, directions=4, seed=s) for s in (0, 0, 1)]
    first, again, other = (each.directions for each in drawn)
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
    run = training_jacobian(
        TrainingRun(objective_of(case), BATCHES, rate, theta=start), directions=1
    )
    assert torch.equal(flat_parameters(case), before)
    assert torch.equal(run.theta_0, start)
    assert torch.allclose(run.theta_T, trained_by_torch(case, start), rtol=1e-10, atol=1e-12)
    assert repr(run) == f"TrainingJacobian(P={len(start)}, directions=1)"


def test_what_it_measures_is_not_taken_for_the_objectives_own_blocks(case: Case) -> None:
    objective = Objective(case.model, case.loss, case.data)
    before = objective.multiplier.state_dict()
    training_jacobian(TrainingRun(objective, BATCHES, rate))
    assert objective.multiplier.state_dict() == before


def test_float32_agrees_with_float64_to_its_rounding() -> None:
    runs: list[TrainingJacobian] = []
    for dtype in (torch.float32, torch.float64):
        objective = objective_of(mlp().to(dtype))
        runs.append(training_jacobian(TrainingRun(objective, BATCHES, rate, momentum=0.9)))
    assert runs[0].columns.dtype == torch.float32
    assert torch.allclose(runs[0].columns.double(), runs[1].columns, atol=1e-4)


def test_what_cannot_be_used_is_refused(case: Case) -> None:
    objective = objective_of(case)
    run = TrainingRun(objective, BATCHES, 0.1)
    with pytest.raises(InvalidInput, match="chunk_size: got 0"):
        training_jacobian(run, chunk_size=0)
    for wrong in (torch.ones(objective.num_parameters), torch.ones(3, 2)):
        with pytest.raises(InvalidInput, match="directions: got"):
            training_jacobian(run, directions=wrong.double())
    with pytest.raises(InvalidInput, match="k: got 0"):
        training_jacobian(run, directions=0)
    with pytest.raises(InvalidInput, match="samples: got 11"):
        training_jacobian(TrainingRun(objective, [torch.tensor([11])], 0.1))


def test_a_run_that_diverges_is_an_error(case: Case) -> None:
    with pytest.raises(Diverged):
        training_jacobian(TrainingRun(objective_of(case), BATCHES * 10, 1e10))
