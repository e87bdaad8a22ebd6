from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from thalweg.linalg import orthonormalize
from thalweg.operators.symmetric import DenseOperator
from thalweg.tracking.error_estimate import (
    LARGEST_RATIO,
    Deviation,
    Movement,
    bias,
    content,
    deviation_by_difference,
    deviation_by_half,
    mixing,
    population_correction,
    relative,
    spread,
    total,
    turn,
)
from thalweg.tracking.power_step import PowerStep, lockstep_power_step, power_step
from thalweg.tracking.reference import Curvature, Reference

SIZE, K, GUARDS, SAMPLES = 40, 3, 2, 16


def test_what_is_left_along_one_direction_is_a_geometric_series() -> None:
    # An error of 1 of which the share r is left: the step has moved 1 - r.
    for r in (0.1, 0.5, 0.9):
        assert bias(r, 1 - r, r) == pytest.approx(r)
    # Below zero there is no lambda_{b+1}, and near lambda_k its bound is finite.
    assert bias(0.3, 2.0, -0.5) == pytest.approx(0.6)
    assert bias(1.0, 1.0, 1.0) == pytest.approx(1 / (1 - LARGEST_RATIO))


def test_errors_add_in_squares_up_to_one_and_all_samples_have_none_of_sampling() -> None:
    assert total(0.3, 0.4) == 0.5
    assert total(3.0, 4.0) == 1.0
    assert population_correction(10, 10) == 0.0
    assert population_correction(19, 100) == pytest.approx(0.9)


def test_relative_errors_are_of_each_run_and_those_of_a_zero_vector_vanish() -> None:
    vectors = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert relative(vectors / 2, vectors) == [0.5, 0.0]
    assert relative(vectors[0], 2 * vectors[0]) == [0.5]


def spectrum(generator: torch.Generator, below: list[float]) -> tuple[Tensor, Tensor]:
    """A symmetric matrix with 9, 6, 4 above what is given, and its eigenvectors, descending."""
    rest = torch.linspace(0.4, -0.4, SIZE - K - len(below))
    values = torch.cat([torch.tensor([9.0, 6.0, 4.0, *below]), rest]).double()
    normal = torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)
    vectors = torch.linalg.qr(normal)[0]
    return (vectors * values) @ vectors.T, vectors


def rows_near(vectors: Tensor, distance: float, generator: torch.Generator) -> Tensor:
    """Orthonormal rows near the columns given."""
    noise = torch.randn(vectors.shape, generator=generator, dtype=torch.float64)
    return orthonormalize(vectors + distance * noise).T.contiguous()


def estimated_and_true(
    matrix: Tensor, vectors: Tensor, rows: Tensor, ratio: float, vector: Tensor
) -> tuple[float, float]:
    """What a power step is estimated to leave of the error of P_k v, and what it leaves."""
    step = power_step(rows, rows @ matrix, K)
    moved = Movement.of(step, vector)
    fraction = content(step, moved, matrix @ moved.weighted)
    top = vectors[:, :K]
    true = (step.project(vector) - top @ (top.T @ vector)).norm()
    return bias(float(fraction), float(moved.size), ratio), float(true)


@pytest.mark.parametrize("guards", [0, GUARDS])
@pytest.mark.parametrize("next_value", [0.5, 2.0, 3.6])
def test_an_error_along_the_next_eigenvector_is_estimated_exactly(
    guards: int, next_value: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix, vectors = spectrum(generator, [*[3.9, 3.8][:guards], next_value])
    b = K + guards
    tilt = 1e-4 * torch.randn(b, generator=generator, dtype=torch.float64)
    # Of one sign: what three vectors lack along one direction could cancel.
    tilt = tilt.abs()
    tilt[K:] = 0
    rows = orthonormalize(vectors[:, :b] + vectors[:, b : b + 1] * tilt).T.contiguous()
    vector = vectors[:, :K].sum(1)
    estimated, true = estimated_and_true(matrix, vectors, rows, next_value / 4, vector)
    # Its factor is that of lambda_k; of lambda_1 and lambda_2 less is left.
    assert 0.999 * true < estimated < true / (1 - next_value / 4)
    alone = vectors[:, 2].clone()
    estimated, true = estimated_and_true(matrix, vectors, rows, next_value / 4, alone)
    assert estimated == pytest.approx(true, rel=1e-3)


@pytest.mark.parametrize("guards", [0, GUARDS])
def test_an_error_anywhere_in_the_bulk_is_bounded_and_not_by_far(guards: int) -> None:
    r, ratios = 2.4 / 4, []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        matrix, vectors = spectrum(generator, [*[3.9, 3.8][:guards], 2.4])
        b = K + guards
        tilts = 1e-4 * torch.randn(SIZE - b, b, generator=generator, dtype=torch.float64)
        rows = orthonormalize(vectors[:, :b] + vectors[:, b:] @ tilts).T.contiguous()
        estimated, true = estimated_and_true(matrix, vectors, rows, r, vectors[:, 2])
        # Of one eigenvector: each component is taken at least as it is, the largest as it is, and
        # those at -0.4 as (1 + 0.1) / (1 - r) times what they are.
        assert 0.999 * true < estimated < 1.1 / (1 - r) * true
        vector = torch.randn(SIZE, generator=generator, dtype=torch.float64)
        estimated, true = estimated_and_true(matrix, vectors, rows, r, vector)
        ratios.append(math.log(estimated / true))
    assert 1 < math.exp(sum(ratios) / len(ratios)) < 2.5


def test_the_movement_is_that_of_the_projection_and_none_after_a_solve() -> None:
    # Without guards; to first order in the distance.
    generator = torch.Generator().manual_seed(1)
    matrix, vectors = spectrum(generator, [])
    rows = rows_near(vectors[:, :K], 1e-3, generator)
    step = power_step(rows, rows @ matrix, K)
    vector = torch.randn(SIZE, generator=generator, dtype=torch.float64)
    change = (step.rows.T @ step.rows - rows.T @ rows) @ vector
    assert float(Movement.of(step, vector).size) == pytest.approx(float(change.norm()), rel=0.01)
    nothing = Movement.of(PowerStep(rows, step.values), vector)
    assert float(nothing.size) == 0.0
    assert not bool(nothing.weighted.any())
    assert float(content(step, nothing, torch.ones_like(vector))) == 0.0


def sampled(whole: Tensor, size: float, generator: torch.Generator) -> Curvature:
    """A matrix of each sample, so far from `whole`."""
    noise = size * torch.randn(SAMPLES, SIZE, SIZE, generator=generator, dtype=torch.float64)
    each = whole + noise + noise.mT

    def over(samples: Tensor | None) -> DenseOperator:
        return DenseOperator(each[slice(None) if samples is None else samples].mean(0))

    return over


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("guards", [0, GUARDS])
def test_the_sampling_error_is_what_one_half_in_place_of_the_subset_does(
    turned: bool, guards: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    whole, vectors = spectrum(generator, [2.0, 1.5][:guards])
    b = K + guards
    rows = rows_near(vectors[:, :b], 0.01, generator)
    before, now = (sampled(whole, 1e-4, generator) for _ in range(2))
    halves = torch.arange(8).reshape(2, 4)
    reference = Reference.at(before, rows, (before(None) @ rows.T).T, halves)
    if turned:
        reference = reference.turned(power_step(rows, reference.images(now)[0], K).block)
    step = power_step(reference.rows, reference.images(now)[0], K)
    half = now(reference.first_half)
    # The same power step with the first half in place of the subset.
    corrected = (half @ reference.rows.T).T + reference.offset_first
    other = power_step(reference.rows, corrected, K)
    vector = torch.randn(SIZE, generator=generator, dtype=torch.float64)
    within, outside = step.project(vector), vector - step.block.T @ (step.block @ vector)
    # What is in the basis moves out of the block, what is outside of the block moves in.
    for part in (within, outside):
        away = other.project(part) - step.project(part)
        if part is within:
            away = away - step.block.T @ (step.block @ away)
        found = deviation_by_half(reference, half, step, part)
        assert float(found.outside) == pytest.approx(float(away.norm()), rel=0.05)
    nothing = deviation_by_half(reference, half, step, torch.zeros_like(vector))
    assert float(nothing.outside) == 0.0


THETA = torch.tensor([9.0, 6.0, 4.0, 3.0, 2.0], dtype=torch.float64)


def diagonal_step() -> PowerStep:
    """A block of five unit vectors, the first three of which are the basis."""
    rows = torch.eye(K + GUARDS, SIZE, dtype=torch.float64)
    return PowerStep(rows, THETA, K, torch.diag(1 / THETA), rows)


def noise(sigma: float, generator: torch.Generator) -> Tensor:
    """Symmetric (5, 5) with entries of deviation sigma sqrt(theta_i theta_j)."""
    normal = torch.randn(len(THETA), len(THETA), generator=generator, dtype=torch.float64)
    upper = normal.triu()
    return sigma * (upper + normal.triu(1).T) * (THETA[:, None] * THETA).sqrt()


def test_what_mixes_in_the_block_is_what_noise_does_to_the_ritz_vectors() -> None:
    # Against eigenvectors of diag(theta) + E, E drawn 4,000 times.
    generator = torch.Generator().manual_seed(3)
    vector = torch.zeros(SIZE, dtype=torch.float64)
    vector[: K + GUARDS + 1] = torch.tensor([1.0, -2.0, 0.5, 1.0, 3.0, 7.0])
    sigma, squares = 0.003, []
    for _ in range(4000):
        turned = torch.linalg.eigh(torch.diag(THETA) + noise(sigma, generator)).eigenvectors
        top, inside = turned[:, -K:], vector[: K + GUARDS]
        before = torch.cat([inside[:K], torch.zeros(GUARDS).double()])
        squares.append(float((top @ (top.T @ inside) - before).square().sum()))
    expected = math.sqrt(sum(squares) / len(squares))
    assert mixing(diagonal_step(), sigma, vector) == pytest.approx(expected, rel=0.05)
    # However large the noise, a vector turns by no more than a right angle.
    assert mixing(diagonal_step(), 1e9, vector) <= math.sqrt(
        GUARDS * float(vector[:K].square().sum()) + K * float(vector[K : K + GUARDS].square().sum())
    )


def test_the_noise_of_eigenvalues_is_found_from_what_a_half_does_in_the_block() -> None:
    generator = torch.Generator().manual_seed(4)
    step, sigma = diagonal_step(), 0.02
    vector = torch.zeros(SIZE, dtype=torch.float64)
    vector[:K] = torch.tensor([1.0, -2.0, 0.5])
    found = []
    for _ in range(2000):
        independent = torch.randn(len(THETA), K, generator=generator, dtype=torch.float64)
        difference = sigma * independent * (THETA[:, None] * THETA[:K]).sqrt()
        inside = difference @ (vector[:K] / THETA[:K])
        found.append(spread(step, Deviation(torch.zeros(()), inside), vector) ** 2)
    assert math.sqrt(sum(found) / len(found)) == pytest.approx(sigma, rel=0.03)
    assert math.isnan(spread(step, Deviation(torch.zeros(()), inside), 0 * vector))


@pytest.mark.parametrize("angle", [0.0, 0.02, 0.5, 1.5])
def test_the_turn_of_a_step_is_the_angle_between_the_spaces(angle: float) -> None:
    rows = torch.eye(2, 5, dtype=torch.float64)
    turned = rows.clone()
    turned[1, 1], turned[1, 4] = math.cos(angle), math.sin(angle)
    step = PowerStep(turned, torch.tensor([2.0, 1.0]), 2, torch.eye(2), rows)
    assert float(turn(step)) == pytest.approx(math.sin(angle), abs=1e-7)


def test_in_lockstep_the_sampling_error_is_what_the_difference_does_to_the_projection() -> None:
    # Against the step made from images that are off by the difference, to first order.
    generator = torch.Generator().manual_seed(2)
    pairs = [spectrum(generator, []) for _ in range(2)]
    matrices = torch.stack([matrix for matrix, _ in pairs])
    rows = torch.stack([rows_near(vectors[:, :K], 0.03, generator) for _, vectors in pairs])
    images = rows @ matrices
    vectors = torch.randn(2, SIZE, generator=generator, dtype=torch.float64)
    difference = 1e-5 * torch.randn(images.shape, generator=generator, dtype=torch.float64)
    step = lockstep_power_step(rows, images, difference)
    off = lockstep_power_step(rows, images + difference).project(vectors)
    expected = (off - step.project(vectors)).norm(dim=1)
    # M changes with the images as well, of second order in the distance of U from C.
    found = deviation_by_difference(step, vectors).outside
    assert torch.allclose(found, expected, rtol=0.1)


def test_in_lockstep_movement_and_content_are_those_of_each_run_alone() -> None:
    generator = torch.Generator().manual_seed(5)
    pairs = [spectrum(generator, [2.4]) for _ in range(2)]
    matrices = torch.stack([matrix for matrix, _ in pairs])
    rows = torch.stack([rows_near(vectors[:, :K], 1e-3, generator) for _, vectors in pairs])
    vectors = torch.randn(2, SIZE, generator=generator, dtype=torch.float64)
    step = lockstep_power_step(rows, rows @ matrices)
    moved = Movement.of(step, vectors)
    fractions = content(step, moved, torch.einsum("rpq,rq->rp", matrices, moved.weighted))
    for run in range(2):
        alone = power_step(rows[run], rows[run] @ matrices[run], K)
        expected = Movement.of(alone, vectors[run])
        assert float(moved.size[run]) == pytest.approx(float(expected.size), rel=1e-6)
        fraction = content(alone, expected, matrices[run] @ expected.weighted)
        assert float(fractions[run]) == pytest.approx(float(fraction), rel=1e-6)
