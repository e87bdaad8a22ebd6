from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from thalweg.errors import InvalidInput
from thalweg.loss.objective import Objective
from thalweg.operators.hessian import Hessian
from thalweg.problems import InputShape, Problem, build_problem
from thalweg.problems.problem_spec import ProblemSpec
from thalweg.problems.valley import PointInValley

A, B, C = 1000.0, 1.0, 100.0
HESSIAN = torch.diag(torch.tensor([A, B], dtype=torch.float64))
COUPLING = torch.tensor([[0.0, C], [C, 0.0]], dtype=torch.float64)
START = torch.tensor([0.05, 1.0], dtype=torch.float64)


def valley(**data: Any) -> Problem:
    raw = {"data": {"name": "valley", **data}, "model": "valley", "loss": "output"}
    return build_problem(ProblemSpec.model_validate(raw), 0, torch.float64)


def objective(vectorize_up_to: int = 0, **data: Any) -> Objective:
    problem = valley(**data)
    return Objective(problem.model, problem.loss, problem.train, vectorize_up_to=vectorize_up_to)


def descend(loss: Objective, lr: float, samples: Sequence[Tensor | None]) -> Tensor:
    """theta after one step of gradient descent for each entry: these samples, or None for all."""
    theta = loss.theta()
    for chosen in samples:
        theta = theta - lr * loss.gradient(theta, chosen)
    return theta


def test_it_begins_at_its_start_to_the_last_bit() -> None:
    assert objective().theta().tolist() == START.tolist()


@pytest.mark.parametrize("copies", [1, 4])
def test_the_loss_is_that_of_the_valley(copies: int) -> None:
    loss = objective(copies=copies)
    assert loss.num_samples == 2 * copies
    value, gradient = loss.value_and_gradient()
    assert float(value) == pytest.approx((A * 0.05**2 + B) / 2, rel=1e-14)
    torch.testing.assert_close(gradient, HESSIAN @ START, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(("sample", "sign"), [(0, 1), (1, -1)])
def test_the_noise_of_a_component_is_the_coupling_times_y_and_x(sample: int, sign: int) -> None:
    loss = objective()
    noise = loss.gradient(samples=torch.tensor([sample])) - loss.gradient()
    expected = sign * C * START.flip(0)
    torch.testing.assert_close(noise, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("vectorize_up_to", [0, 100])
@pytest.mark.parametrize("keep_graph", [False, True])
@pytest.mark.parametrize(("samples", "sign"), [(None, 0), ([0], 1), ([1], -1)])
def test_hessians_are_exact_in_every_way_of_multiplying(
    vectorize_up_to: int, keep_graph: bool, samples: list[int] | None, sign: int
) -> None:
    loss = objective(vectorize_up_to)
    chosen = None if samples is None else torch.tensor(samples)
    hessian = Hessian(loss, loss.theta(), chosen, keep_graph=keep_graph)
    found = hessian @ torch.eye(2, dtype=torch.float64)
    torch.testing.assert_close(found, HESSIAN + sign * COUPLING, rtol=1e-14, atol=1e-14)


def test_gd_shrinks_each_coordinate_by_its_own_factor() -> None:
    lr, steps = 0.0004, 20
    found = descend(objective(), lr, [None] * steps)
    expected = torch.tensor([(1 - lr * A) ** steps * 0.05, (1 - lr * B) ** steps])
    torch.testing.assert_close(found, expected.double(), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize(("factor", "converges"), [(0.99, True), (1.01, False)])
def test_two_over_the_learning_rate_is_the_edge_of_stability_of_gd(
    factor: float, converges: bool
) -> None:
    loss = objective()
    x = descend(loss, factor * 2 / A, [None] * 200)[0].abs()
    assert (float(x) < 0.05 * 0.05) == converges
    assert (float(x) > 0.05 * 20) == (not converges)


def test_components_in_turn_lower_y_by_their_order_alone() -> None:
    """(I - lr H_-)(I - lr H_+) has the entry (1 - lr b)^2 - (lr c)^2 from y to y."""
    lr = 0.001  # so that 1 - lr a = 0, and x has no memory
    turn = [torch.tensor([0]), torch.tensor([1])]
    loss = objective()
    loss.layout.write(loss.model, torch.tensor([0.0, 1.0], dtype=torch.float64))
    found = descend(loss, lr, turn)[1]
    assert float(found) == pytest.approx((1 - lr * B) ** 2 - (lr * C) ** 2, rel=1e-12)


def test_with_independent_signs_the_mean_of_sgd_is_gd() -> None:
    """All 2^3 sequences of signs, each equally likely."""
    lr, loss = 0.0005, objective()
    ends = [
        descend(loss, lr, [torch.tensor([number >> place & 1]) for place in range(3)])
        for number in range(8)
    ]
    torch.testing.assert_close(torch.stack(ends).mean(0), descend(loss, lr, [None] * 3))


def test_other_inputs_are_refused() -> None:
    with pytest.raises(InvalidInput, match=r"inputs of shape \(1, 8, 8\), allowed: the coeff"):
        PointInValley().build(InputShape((1, 8, 8)), 1)
