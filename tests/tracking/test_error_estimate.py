from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from thalweg.linalg import orthonormalize
from thalweg.operators.symmetric import DenseOperator
from thalweg.tracking.error_estimate import (
    INITIAL,
    LEAST,
    MOST,
    ErrorEstimate,
    lockstep_errors,
    movement,
    population_correction,
    relative,
    sampling_error,
    total,
)
from thalweg.tracking.power_step import PowerStep, lockstep_power_step, power_step
from thalweg.tracking.reference import Curvature, Reference

SIZE, K, SAMPLES = 40, 3, 16


@pytest.mark.parametrize(
    ("ratio", "value"), [(0.0, INITIAL), (0.6, 0.3), (5.0, MOST), (math.inf, MOST)]
)
def test_it_begins_with_half_the_ratio_within_its_range(ratio: float, value: float) -> None:
    estimate = ErrorEstimate()
    estimate.begin(ratio)
    assert estimate.damping == value


@pytest.mark.parametrize("share", [0.03, 0.2, 0.7])
def test_it_comes_to_the_share_that_each_renewal_shows(share: float) -> None:
    estimate = ErrorEstimate()
    for _ in range(30):
        # The errors of bias and sampling are orthogonal.
        estimate.learn(
            checked=math.hypot(0.01 * share, 0.004), sampling=0.004, bias=estimate.bias(0.01)
        )
    assert estimate.damping == pytest.approx(share, rel=1e-6)


def test_it_stays_in_its_range_whatever_is_shown() -> None:
    estimate = ErrorEstimate()
    for _ in range(60):
        estimate.learn(checked=1.0, sampling=0.0, bias=estimate.bias(0.01))
    assert estimate.damping == pytest.approx(MOST)
    for _ in range(60):
        estimate.learn(checked=0.001, sampling=0.01, bias=estimate.bias(0.01))
    assert estimate.damping == pytest.approx(LEAST)


def test_a_step_that_moved_nothing_teaches_nothing() -> None:
    estimate = ErrorEstimate()
    estimate.learn(checked=0.5, sampling=0.0, bias=0.0)
    assert estimate.damping == INITIAL


def test_a_direction_of_the_bulk_overtakes_where_its_eigenvalue_is_larger_by_the_tolerance() -> (
    None
):
    estimate = ErrorEstimate()
    assert not estimate.overtaken(1.0, 0.001)
    estimate.gap.value = 1.0005
    assert not estimate.overtaken(1.0, 0.001)
    estimate.gap.value = 1.002
    assert estimate.overtaken(1.0, 0.001)


def test_the_error_left_by_a_fresh_product_is_that_of_a_geometric_series() -> None:
    estimate = ErrorEstimate()
    estimate.begin(0.6)
    # An error e = 1 of which 0.3 is left: the product has moved the projection by 0.7.
    assert estimate.left(0.7) == pytest.approx(0.3)
    assert estimate.left(100.0) == 1.0


def test_errors_add_in_squares_and_all_samples_have_none_of_sampling() -> None:
    assert total(3.0, 4.0) == 5.0
    assert population_correction(10, 10) == 0.0
    assert population_correction(19, 100) == pytest.approx(0.9)


def test_relative_errors_are_of_each_run_and_those_of_a_zero_vector_vanish() -> None:
    vectors = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert relative(vectors / 2, vectors) == [0.5, 0.0]
    assert relative(vectors[0], 2 * vectors[0]) == [0.5]


def matrix(generator: torch.Generator) -> Tensor:
    """Symmetric, with three eigenvalues that stand out."""
    values = torch.cat([torch.tensor([9.0, 6.0, 4.0]), torch.linspace(-0.4, 0.4, SIZE - K)])
    normal = torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)
    vectors = torch.linalg.qr(normal)[0]
    return (vectors * values.double()) @ vectors.T


def rows_near(matrix: Tensor, distance: float, generator: torch.Generator) -> Tensor:
    """Orthonormal rows near its top eigenvectors."""
    top = torch.linalg.eigh(matrix).eigenvectors[:, -K:]
    noise = torch.randn(SIZE, K, generator=generator, dtype=torch.float64)
    return orthonormalize(top + distance * noise).T.contiguous()


def sampled(whole: Tensor, spread: float, generator: torch.Generator) -> Curvature:
    """A matrix of each sample, so far from `whole`."""
    noise = spread * torch.randn(SAMPLES, SIZE, SIZE, generator=generator, dtype=torch.float64)
    each = whole + noise + noise.mT

    def over(samples: Tensor | None) -> DenseOperator:
        return DenseOperator(each[slice(None) if samples is None else samples].mean(0))

    return over


@pytest.mark.parametrize("turned", [False, True])
def test_the_sampling_error_is_what_one_half_in_place_of_the_subset_does(turned: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    whole = matrix(generator)
    rows = rows_near(whole, 0.01, generator)
    before, now = (sampled(whole, 1e-4, generator) for _ in range(2))
    reference, _ = Reference.at(before, rows, 8, SAMPLES, generator)
    if turned:
        reference = reference.turned(power_step(rows, reference.images(now)[0], K).rows)
    step = power_step(reference.rows, reference.images(now)[0], K)
    half = now(reference.first_half)
    vector = torch.randn(SIZE, generator=generator, dtype=torch.float64)
    # The same power step with the first half in place of the subset.
    corrected = (half @ reference.rows.T).T + reference.offset_first
    other = power_step(reference.rows, corrected, K)
    expected = (other.project(vector) - step.project(vector)).norm() / vector.norm()
    found = sampling_error(reference, half, step, vector)
    assert found == pytest.approx(float(expected), rel=0.05)
    assert sampling_error(reference, half, step, torch.zeros_like(vector)) == 0.0


def test_the_movement_is_that_of_the_projection_and_none_after_a_solve() -> None:
    generator = torch.Generator().manual_seed(1)
    whole = matrix(generator)
    rows = rows_near(whole, 0.1, generator)
    step = power_step(rows, rows @ whole, K)
    vector = torch.randn(SIZE, generator=generator, dtype=torch.float64)
    change = (step.rows.T @ step.rows - rows.T @ rows) @ vector
    assert movement(step, vector) == pytest.approx(float(change.norm() / vector.norm()))
    assert movement(PowerStep(rows, step.eigenvalues), vector) == 0.0


def test_in_lockstep_the_sampling_error_is_what_the_difference_does_to_the_projection() -> None:
    # Against the step made from images that are off by the difference, to first order.
    generator = torch.Generator().manual_seed(2)
    matrices = torch.stack([matrix(generator) for _ in range(2)])
    rows = torch.stack([rows_near(each, 0.03, generator) for each in matrices])
    images = rows @ matrices
    vectors = torch.randn(2, SIZE, generator=generator, dtype=torch.float64)
    difference = 1e-5 * torch.randn(images.shape, generator=generator, dtype=torch.float64)
    step = lockstep_power_step(rows, images, difference)
    off = lockstep_power_step(rows, images + difference).project(vectors)
    expected = (off - step.project(vectors)).norm(dim=1) / vectors.norm(dim=1)
    sampling, moved = lockstep_errors(step, vectors)
    # M changes with the images as well, of second order in the distance of U from C.
    assert torch.allclose(sampling, expected, rtol=0.05)
    before = torch.einsum("rkp,rkq,rq->rp", rows, rows, vectors)
    away = (step.project(vectors) - before).norm(dim=1) / vectors.norm(dim=1)
    assert torch.allclose(moved, away, rtol=1e-9)
    without = lockstep_errors(lockstep_power_step(rows, images), vectors)
    assert without[0].tolist() == [0.0, 0.0]
    assert torch.allclose(without[1], moved)
