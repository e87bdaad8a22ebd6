from __future__ import annotations

import pytest
import torch

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
from thalweg.contrib.training_jacobian.jacobian import training_jacobian
from thalweg.contrib.training_jacobian.perturbation_response import (
    SIZES,
    PerturbationResponses,
    perturbation_responses,
)
from thalweg.contrib.training_jacobian.singular_spectrum import singular_spectrum
from thalweg.contrib.training_jacobian.training_run import TrainingRun
from thalweg.errors import InvalidInput
from thalweg.loss.objective import Objective


def test_on_a_quadratic_the_prediction_is_exact_at_every_size() -> None:
    objective = Objective(Quadratic(), None, (hessians(),))
    batches = [torch.tensor([0, 1]), torch.tensor([2]), None]
    run = TrainingRun(objective, batches, 0.1, **HEAVY_BALL)
    jacobian = training_jacobian(run)
    spectrum = singular_spectrum(jacobian)
    found = perturbation_responses(run, jacobian, spectrum.right)
    assert found.sizes.tolist() == pytest.approx(SIZES)
    assert (SIZES[0], SIZES[-1]) == pytest.approx((1e-3, 1e3))
    assert torch.allclose(found.predicted, spectrum.values[:, None] * found.sizes, rtol=1e-10)
    assert torch.allclose(found.along, found.predicted, rtol=1e-10)
    assert float(found.error.max()) < 1e-10
    assert found.linear_up_to(1e-8).tolist() == pytest.approx([1e3] * 3)


def test_responses_are_those_of_runs_by_torch() -> None:
    case = mlp().to(torch.float64)
    run = TrainingRun(objective_of(case), BATCHES, rate, **HEAVY_BALL)
    jacobian = training_jacobian(run)
    spectrum, sizes = singular_spectrum(jacobian), [0.01, 0.1, 3.0]
    columns = [0, 10]
    found = perturbation_responses(run, jacobian, spectrum.right[:, columns], sizes)
    for i, column in enumerate(columns):
        for j, size in enumerate(sizes):
            start = run.theta_0 + size * spectrum.right[:, column]
            delta = trained_by_torch(case, start, **HEAVY_BALL) - jacobian.theta_T
            along = spectrum.left[:, column] @ delta
            rest = delta - along * spectrum.left[:, column]
            assert float(found.along[i, j]) == pytest.approx(float(along), rel=1e-8)
            assert float(found.beside[i, j]) == pytest.approx(float(rest.norm()), rel=1e-6)
            error = (delta / size - jacobian.columns @ spectrum.right[:, column]).norm()
            expected = float(error / spectrum.values[column])
            assert float(found.error[i, j]) == pytest.approx(expected, rel=1e-6)


def test_the_error_of_a_smooth_net_is_of_first_order_in_the_size() -> None:
    run = TrainingRun(objective_of(mlp().to(torch.float64)), BATCHES, rate)
    jacobian = training_jacobian(run)
    first = singular_spectrum(jacobian).right[:, :1]
    small, large = perturbation_responses(run, jacobian, first, [1e-4, 1e-3]).error[0]
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
    run = TrainingRun(objective, [None] * 10, 1e-3)
    first = torch.eye(3, 1).double()
    found = perturbation_responses(run, training_jacobian(run), first, [1e-3, 1e4])
    assert found.along.isnan().tolist() == [[False, True]]
    assert found.linear_up_to().tolist() == pytest.approx([1e-3])


def test_what_cannot_be_used_is_refused() -> None:
    run = TrainingRun(Objective(Quadratic(), None, (hessians(),)), [None], 0.1)
    whole = training_jacobian(run)
    some = training_jacobian(run, directions=1)
    one = torch.eye(3).double()
    for jacobian, directions, sizes, message in (
        (some, one, [1.0], "jacobian: got 'J times 1 directions'"),
        (whole, one[0], [1.0], "directions: got"),
        (whole, one[:2], [1.0], "directions: got"),
        (whole, 2 * one, [1.0], "a norm of 2"),
        (whole, one, [], "sizes: got"),
        (whole, one, [0.0, 1.0], "sizes: got"),
        (whole, one, [1.0, 0.5], "sizes: got"),
    ):
        with pytest.raises(InvalidInput, match=message):
            perturbation_responses(run, jacobian, directions, sizes)
