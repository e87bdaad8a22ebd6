from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import dense
from tests.networks import silu
from thalweg import registry
from thalweg.loss.objective import Objective
from thalweg.loss.samples import TensorSamples
from thalweg.measure.batch_sharpness import batch_sharpness
from thalweg.measure.step_state import BATCHES, StepState
from thalweg.spectrum.subspace import Subspace
from thalweg.tracking.source import FixedSubspace

Batches = Callable[[int], list[Tensor]]


def one_sample_each(number: int) -> list[Tensor]:
    """All samples of `least_squares`, one at a time: the mean over these batches is exact."""
    return [torch.tensor([n]) for n in range(number)]


def least_squares(batches: Batches | None = one_sample_each, **options: Any) -> StepState:
    """mean (x theta - y)^2 over as many samples as there are batches, with S_2 of its Hessian."""
    torch.manual_seed(0)
    inputs = torch.randn(BATCHES, 4).double() * torch.tensor([6.0, 4.0, 1.0, 0.5])
    target = torch.randn(BATCHES, 1).double()
    objective = Objective(nn.Linear(4, 1, bias=False).double(), nn.MSELoss(), (inputs, target))
    values, vectors = torch.linalg.eigh(2 * inputs.T @ inputs / BATCHES)
    source = FixedSubspace(Subspace(vectors.flip(1)[:, :2], values.flip(0)[:2]))
    theta = torch.tensor([1.0, -2.0, 3.0, 1.0], dtype=torch.float64)
    return StepState(0, theta, objective, source, learning_rate=0.01, batches=batches, **options)


def measure(name: str, state: StepState) -> dict[str, Any]:
    row = dict(registry.probes[name].measure(state))
    assert set(row) <= set(registry.probes[name].columns)
    return row


def gradients_of_samples(state: StepState) -> Tensor:
    """(N, P), written out."""
    samples = state.objective.samples
    assert isinstance(samples, TensorSamples)
    inputs, target = samples.tensors
    return 2 * (inputs @ state.theta[:, None] - target) * inputs


def test_the_noise_is_that_of_the_covariance_of_the_samples_gradients() -> None:
    state = least_squares()
    covariance = torch.cov(gradients_of_samples(state).T, correction=0)
    basis = state.source.subspace.basis
    row = measure("noise", state)
    assert row["noise_norm"] == pytest.approx(float(covariance.trace()) ** 0.5)
    share = float((basis.T @ covariance @ basis).trace() / covariance.trace())
    assert 0 < share < 1
    assert row["noise_share_dominant"] == pytest.approx(share)


def test_noise_along_one_direction_lies_in_it_wholly() -> None:
    for direction, share in ((0, 1.0), (3, 0.0)):
        state = least_squares()
        columns = torch.eye(4, dtype=torch.float64)[:, [0, 1]]
        state.source = FixedSubspace(Subspace(columns, torch.ones(2).double()))
        deviations = torch.zeros(4, BATCHES, dtype=torch.float64)
        deviations[direction, 0] = 8.0
        state.batch_gradients = state.gradient[:, None] + deviations
        row = measure("noise", state)
        assert row["noise_share_dominant"] == pytest.approx(share)
        assert row["noise_norm"] == pytest.approx((64 / BATCHES) ** 0.5)


def test_equal_gradients_have_no_noise_to_share() -> None:
    state = least_squares(lambda number: [torch.arange(BATCHES)] * number)
    state.batch_gradients = state.gradient[:, None].repeat(1, BATCHES)
    row = measure("noise", state)
    assert row["noise_norm"] == 0
    assert math.isnan(row["noise_share_dominant"])


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("batches", [one_sample_each, None])
def test_at_the_critical_learning_rate_a_projected_step_keeps_the_expected_loss(
    part: int, batches: Batches | None
) -> None:
    state = least_squares(batches)
    name = ("dominant", "bulk")[part]
    critical = measure("critical_learning_rates", state)[f"critical_lr_{name}"]
    steps = gradients_of_samples(state)
    if batches is None:
        steps = steps.mean(0, keepdim=True)

    def change(lr: float) -> float:
        made = [state.theta - lr * state.subspace.split(g)[part] for g in steps]
        return float(sum(state.objective.value(t) - state.loss for t in made)) / len(made)

    scale = float(state.objective.gradient(state.theta).norm()) ** 2 * critical
    assert change(critical) == pytest.approx(0, abs=1e-12 * scale)
    assert change(0.9 * critical) < 0 < change(1.1 * critical)


def test_noise_lowers_the_critical_learning_rates() -> None:
    noisy = measure("critical_learning_rates", least_squares())
    quiet = measure("critical_learning_rates", least_squares(None))
    for column in registry.probes["critical_learning_rates"].columns:
        assert noisy[column] < quiet[column]


def test_where_the_curvature_is_negative_no_learning_rate_is_critical() -> None:
    def downwards(output: Tensor, target: Tensor) -> Tensor:
        return -(output - target).square().mean()

    state = least_squares()
    state.objective = Objective(
        nn.Linear(4, 1, bias=False).double(),
        downwards,
        (torch.randn(BATCHES, 4).double(), torch.randn(BATCHES, 1).double()),
    )
    row = measure("critical_learning_rates", state)
    assert row == {"critical_lr_dominant": math.inf, "critical_lr_bulk": math.inf}


def network(batches: Batches | None) -> StepState:
    case = silu().to(torch.float64)
    objective = Objective(case.model, case.loss, case.data)
    basis = torch.eye(objective.num_parameters, dtype=torch.float64)[:, :2]
    source = FixedSubspace(Subspace(basis, torch.ones(2).double()))
    return StepState(0, objective.theta(), objective, source, 0.1, batches=batches)


def test_the_batch_sharpness_is_the_ratio_of_means_over_the_batches() -> None:
    case = silu().to(torch.float64)
    theta = dense.flat_parameters(case)
    drawn = [torch.tensor([n, n + 3, n + 5]) for n in range(BATCHES)]
    curvature = square = 0.0
    for rows in drawn:
        loss = dense.flat_loss(case, rows=rows)
        gradient = dense.gradient(loss, theta)
        curvature += float(gradient @ dense.hessian(loss, theta) @ gradient)
        square += float(gradient @ gradient)
    found = measure("batch_sharpness", network(lambda number: drawn[:number]))
    assert found["batch_sharpness"] == pytest.approx(curvature / square, rel=1e-9)


def test_where_a_batch_is_all_samples_it_is_the_curvature_along_the_gradient() -> None:
    state = network(None)
    expected = batch_sharpness(state.objective, state.objective.num_samples, batches=1).value
    found = measure("batch_sharpness", state)["batch_sharpness"]
    assert found == pytest.approx(expected, rel=1e-9)
    assert measure("noise", state) == {}


def test_without_gradients_there_is_no_batch_sharpness() -> None:
    state = network(None)
    state.batch_gradients = torch.zeros(state.theta.numel(), 1, dtype=torch.float64)
    assert math.isnan(measure("batch_sharpness", state)["batch_sharpness"])


def test_all_probes_of_a_step_see_the_same_batches_drawn_once() -> None:
    asked: list[int] = []

    def batches(number: int) -> list[Tensor]:
        asked.append(number)
        return one_sample_each(number)

    state = least_squares(batches)
    for name in ("noise", "critical_learning_rates", "batch_sharpness"):
        measure(name, state)
    assert asked == [BATCHES]
