from __future__ import annotations

import pytest
import torch

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
from thalweg.curvature import Objective
from thalweg.dynamics.perturbation_response import (
    SIZES,
    PerturbationResponses,
    perturbation_responses,
)
from thalweg.dynamics.singular_spectrum import singular_spectrum
from thalweg.dynamics.training_jacobian import training_jacobian
from thalweg.errors import InvalidInput


def test_on_a_quadratic_the_prediction_is_exact_at_every_size() -> None:
    objective = Objective(Quadratic(), None, (hessians(),))
    batches = [torch.tensor([0, 1]), torch.tensor([2]), None]
    run = training_jacobian(objective, batches, 0.1, **HEAVY_BALL)
    spectrum = singular_spectrum(run)
    found = perturbation_responses(objective, batches, 0.1, run, spectrum.right, **HEAVY_BALL)
    assert found.sizes.tolist() == pytest.approx(SIZES)
    assert (SIZES[0], SIZES[-1]) == pytest.approx((1e-3, 1e3))
    assert torch.allclose(found.predicted, spectrum.values[:, None] * found.sizes, rtol=1e-10)
    assert torch.allclose(found.along, found.predicted, rtol=1e-10)
    assert float(found.error.max()) < 1e-10
    assert found.linear_up_to(1e-8).tolist() == pytest.approx([1e3] * 3)


def test_responses_are_those_of_runs_by_torch() -> None:
    case = mlp().to(torch.float64)
    objective = objective_of(case)
    run = training_jacobian(objective, BATCHES, rate, **HEAVY_BALL)
    spectrum, sizes = singular_spectrum(run), [0.01, 0.1, 3.0]
    columns = [0, 10]
    found = perturbation_responses(
        objective, BATCHES, rate, run, spectrum.right[:, columns], sizes, **HEAVY_BALL
    )
    for i, column in enumerate(columns):
        for j, size in enumerate(sizes):
            start = run.theta_0 + size * spectrum.right[:, column]
            delta = trained_by_torch(case, start, **HEAVY_BALL) - run.theta_T
            along = spectrum.left[:, column] @ delta
            rest = delta - along * spectrum.left[:, column]
            assert float(found.along[i, j]) == pytest.approx(float(along), rel=1e-8)
            assert float(found.beside[i, j]) == pytest.approx(float(rest.norm()), rel=1e-6)
            error = (delta / size - run.columns @ spectrum.right[:, column]).norm()
            expected = float(error / spectrum.values[column])
            assert float(found.error[i, j]) == pytest.approx(expected, rel=1e-6)


def test_the_error_of_a_smooth_net_is_of_first_order_in_the_size() -> None:
    objective = objective_of(mlp().to(torch.float64))
    run = training_jacobian(objective, BATCHES, rate)
    first = singular_spectrum(run).right[:, :1]
    small, large = perturbation_responses(objective, BATCHES, rate, run, first, [1e-4, 1e-3]).error[
        0
    ]
    assert float(large / small) == pytest.approx(10, rel=0.02)


def test_linear_up_to_is_the_last_size_before_the_first_error() -> None:
    error = torch.tensor([[0.01, 0.09, 0.2, 0.05], [0.3, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    found = PerturbationResponses(
        torch.tensor([1.0, 2.0, 3.0, 4.0]), 1 + error, 0 * error, torch.ones(3, 4)
    )
    assert found.linear_up_to(0.1).tolist() == [2.0, 0.0, 4.0]


def test_a_run_that_diverges_has_no_response() -> None:
    class Quartic(Quadratic):
        def forward(self, matrices: torch.Tensor) -> torch.Tensor:
            return super().forward(matrices).square()

    objective = Objective(Quartic(), None, (hessians(),))
    batches: list[torch.Tensor | None] = [None] * 10
    run = training_jacobian(objective, batches, 1e-3)
    first = torch.eye(3, 1).double()
    found = perturbation_responses(objective, batches, 1e-3, run, first, [1e-3, 1e4])
    assert found.along.isnan().tolist() == [[False, True]]
    assert found.linear_up_to().tolist() == pytest.approx([1e-3])


def test_what_cannot_be_used_is_refused() -> None:
    objective = Objective(Quadratic(), None, (hessians(),))
    run = training_jacobian(objective, [None], 0.1)
    some = training_jacobian(objective, [None], 0.1, directions=1)
    one = torch.eye(3).double()
    for wrong_run, directions, sizes, message in (
        (some, one, [1.0], "run: got 'J times 1 directions'"),
        (run, one[0], [1.0], "directions: got"),
        (run, one[:2], [1.0], "directions: got"),
        (run, 2 * one, [1.0], "a norm of 2"),
        (run, one, [], "sizes: got"),
        (run, one, [0.0, 1.0], "sizes: got"),
        (run, one, [1.0, 0.5], "sizes: got"),
    ):
        with pytest.raises(InvalidInput, match=message):
            perturbation_responses(objective, [None], 0.1, wrong_run, directions, sizes)
