from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from thalweg.errors import InvalidInput
from thalweg.loss.objective import Objective
from thalweg.operators.hessian import Hessian
from thalweg.problems import InputShape, build_problem
from thalweg.problems.problem_spec import ProblemSpec
from thalweg.problems.quadratic import PointOnQuadratic, Quadratic

SMALL: dict[str, Any] = {
    "components": 40,
    "dimension": 6,
    "dominant": 2,
    "steep": 4.0,
    "flat": 0.1,
    "offset_dominant": 2.0,
    "offset_bulk": 0.5,
}
SPECTRUM = torch.tensor([4.0, 4.0, 0.1, 0.1, 0.1, 0.1], dtype=torch.float64)


def objective(vectorize_up_to: int = 0, run_seed: int = 0, **changes: Any) -> Objective:
    raw = {
        "data": {"name": "quadratic", **SMALL, **changes},
        "model": {"name": "quadratic", "radius": 3.0},
        "loss": "output",
    }
    problem = build_problem(ProblemSpec.model_validate(raw), run_seed, torch.float64)
    return Objective(problem.model, problem.loss, problem.train, vectorize_up_to=vectorize_up_to)


def arrays(settings: Quadratic) -> np.ndarray:
    """The samples (n, 2, d)."""
    return np.asarray(settings.build().train_inputs)


def offsets() -> torch.Tensor:
    """xi (n, d), from the slopes A xi in the data."""
    inputs = torch.from_numpy(arrays(Quadratic(**SMALL)))
    return inputs[:, 1] / SPECTRUM


def test_the_mean_of_the_components_is_the_quadratic() -> None:
    loss = objective()
    theta = loss.theta()
    value, gradient = loss.value_and_gradient()
    assert float(value) == pytest.approx(float(theta @ (SPECTRUM * theta)) / 2, rel=1e-12)
    torch.testing.assert_close(gradient, SPECTRUM * theta, rtol=1e-12, atol=1e-12)


def test_a_component_is_a_square_about_its_offset_less_a_constant() -> None:
    loss, xi = objective(), offsets()[7]
    theta, sample = loss.theta(), torch.tensor([7])

    def square(point: torch.Tensor) -> float:
        return float((point - xi) @ (SPECTRUM * (point - xi))) / 2

    difference = square(theta) - square(torch.zeros_like(theta))
    assert float(loss.value(samples=sample)) == pytest.approx(difference, rel=1e-12)
    torch.testing.assert_close(loss.gradient(samples=sample), SPECTRUM * (theta - xi))


@pytest.mark.parametrize("vectorize_up_to", [0, 100])
@pytest.mark.parametrize("keep_graph", [False, True])
@pytest.mark.parametrize("samples", [None, torch.tensor([3, 5])])
def test_the_hessian_is_the_same_for_all_components(
    vectorize_up_to: int, keep_graph: bool, samples: torch.Tensor | None
) -> None:
    hessian = Hessian(objective(vectorize_up_to), samples=samples, keep_graph=keep_graph)
    found = hessian @ torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(found, torch.diag(SPECTRUM), rtol=1e-12, atol=1e-12)


def test_offsets_have_mean_zero_and_the_deviations_asked_for() -> None:
    many = arrays(Quadratic(**{**SMALL, "components": 4000}))
    xi = many[:, 1] / SPECTRUM.numpy()
    np.testing.assert_allclose(xi.mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(xi.std(axis=0), [2.0, 2.0, 0.5, 0.5, 0.5, 0.5], rtol=0.05)


def test_the_data_depend_on_their_own_seed_and_the_start_on_that_of_the_run() -> None:
    first, other = objective(run_seed=0), objective(run_seed=1)
    assert torch.equal(
        first.gradient(torch.ones(6).double()), other.gradient(torch.ones(6).double())
    )
    assert not torch.equal(first.theta(), other.theta())
    assert float(first.theta().norm()) == pytest.approx(3.0, rel=1e-6)
    drawn = [arrays(Quadratic(**SMALL, seed=seed)) for seed in (0, 1)]
    assert not np.array_equal(drawn[0], drawn[1])


@pytest.mark.parametrize(("factor", "converges"), [(0.98, True), (1.02, False)])
def test_two_over_the_learning_rate_is_the_edge_of_stability_of_gd(
    factor: float, converges: bool
) -> None:
    loss = objective()
    theta = start = loss.theta()
    for _ in range(100):
        theta = theta - factor * 2 / 4.0 * loss.gradient(theta)
    assert (float(theta[:2].norm()) < float(start[:2].norm()) / 20) == converges
    assert (float(theta[:2].norm()) > float(start[:2].norm()) * 20) == (not converges)


def test_a_list_of_curvatures_takes_the_place_of_the_two() -> None:
    curvatures = (5.0, 4.0, 3.0, 2.0, 1.0, 0.5)
    loss = objective(curvatures=curvatures)
    found = loss.gradient(torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(found, torch.tensor(curvatures, dtype=torch.float64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dominant": 6}, "less than dimension, 6"),
        ({"curvatures": (1.0, 2.0)}, "one for each of 6"),
    ],
)
def test_sizes_that_disagree_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Quadratic(**{**SMALL, **changes})


def test_other_inputs_are_refused() -> None:
    with pytest.raises(InvalidInput, match=r"inputs of shape \(3,\), allowed: curvatures and"):
        PointOnQuadratic().build(InputShape((3,)), 1)
