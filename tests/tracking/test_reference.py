from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.networks import Case, digits
from thalweg.linalg import orthonormalize
from thalweg.loss.objective import Objective
from thalweg.operators.hessian import Hessian
from thalweg.operators.symmetric import SymmetricOperator
from thalweg.tracking.reference import Curvature, Reference, draw_halves

K, SIZE = 6, 200


@pytest.fixture(scope="module")
def trained() -> tuple[Objective, Tensor]:
    case: Case = digits().to(torch.float64)
    objective = Objective(case.model, case.loss, case.data, vectorize_up_to=500)
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(objective.num_parameters, K, generator=generator, dtype=torch.float64)
    basis = orthonormalize(block)
    for _ in range(3):
        basis = orthonormalize(Hessian(objective) @ basis)
    return objective, basis.T.contiguous()


def curvature(objective: Objective, theta: Tensor) -> Curvature:
    def at(samples: Tensor | None) -> SymmetricOperator:
        return Hessian(objective, theta, samples)

    return at


def moved(objective: Objective, distance: float) -> Tensor:
    theta = objective.theta()
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(theta.shape, generator=generator, dtype=torch.float64)
    return theta + distance * direction / direction.norm()


def taken(objective: Objective, rows: Tensor) -> tuple[Reference, Tensor]:
    at = curvature(objective, objective.theta())
    whole = (Hessian(objective) @ rows.T).T
    halves = draw_halves(objective.num_samples, SIZE, torch.Generator().manual_seed(2))
    return Reference.at(at, rows, whole, halves), whole


def test_halves_are_disjoint_and_ascending() -> None:
    halves = draw_halves(100, 31, torch.Generator().manual_seed(0))
    assert halves.shape == (2, 15)
    assert len(halves.unique()) == 30
    assert bool((halves[:, 1:] > halves[:, :-1]).all())


def test_where_it_was_taken_the_subset_gives_the_products_of_all_samples(trained) -> None:
    objective, rows = trained
    reference, whole = taken(objective, rows)
    images, gradient, _ = reference.images(curvature(objective, objective.theta()))
    assert torch.allclose(images, whole, atol=1e-10)
    assert gradient is not None
    assert torch.allclose(gradient, objective.gradient(samples=reference.subset), atol=1e-10)


def test_the_correction_removes_most_of_the_sampling_error_nearby(trained) -> None:
    objective, rows = trained
    reference, _ = taken(objective, rows)
    theta = moved(objective, 0.1)
    truth = (Hessian(objective, theta) @ rows.T).T
    plain = (Hessian(objective, theta, reference.subset) @ rows.T).T
    images, *_ = reference.images(curvature(objective, theta))
    assert (images - truth).norm() < 0.2 * (plain - truth).norm()


def test_seen_from_another_basis_the_part_in_the_old_span_is_corrected(trained) -> None:
    objective, rows = trained
    reference, whole = taken(objective, rows)
    rotation = orthonormalize(whole[:, :K])
    turned = reference.turned(rotation.T @ rows)
    images, *_ = turned.images(curvature(objective, objective.theta()))
    # A rotation within the span: corrected in full.
    assert torch.allclose(images, rotation.T @ whole, atol=1e-10)
