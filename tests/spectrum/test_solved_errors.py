"""What a solve says of its errors, against spectra that are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.sampling import few
from thalweg.operators.symmetric import DenseOperator
from thalweg.spectrum.eigensolver import eigenpairs, solve_block, top_eigenpairs
from thalweg.spectrum.metric_subspace import MetricSubspace
from thalweg.spectrum.subspace import Subspace, random_subspace

SIZE, K = 300, 6


def problem(ratio: float, seed: int = 0) -> tuple[DenseOperator, Tensor, Tensor]:
    """A matrix with lambda_7 / lambda_6 = `ratio`, its eigenvalues and eigenvectors, descending."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)
    vectors = torch.linalg.qr(normal)[0]
    top = torch.tensor([10.0, 7.0, 5.0, 3.5, 2.5, 2.0], dtype=torch.float64)
    bulk = torch.linspace(0, 1, SIZE - K, dtype=torch.float64).flip(0) ** 2
    values = torch.cat([top, 2 * ratio * bulk - 0.1 * (1 - bulk)])
    values, order = values.sort(descending=True)
    vectors = vectors[:, order]
    return DenseOperator((vectors * values) @ vectors.T), values, vectors


def off(found: Subspace, wanted: Tensor, vector: Tensor) -> float:
    """The true error of the projection of a vector, relative to it."""
    away = found.project(vector) - wanted @ (wanted.T @ vector)
    return float(away.norm() / vector.norm())


def typical(ratios: list[float]) -> float:
    return math.exp(sum(math.log(each) for each in ratios) / len(ratios))


@pytest.mark.parametrize("ratio", few(2, [0.3, 0.96, 0.8, 0.91]))
@pytest.mark.parametrize("tolerance", few(1, [1e-2, 1e-3]))
def test_the_error_of_a_solve_is_the_residual_over_the_gap(ratio: float, tolerance: float) -> None:
    within, across = [], []
    for seed in range(8):
        operator, _, vectors = problem(ratio, seed)
        found = top_eigenpairs(operator, K, tolerance=tolerance, seed=seed)
        top = vectors[:, :K]
        inside, anywhere = top.sum(1), vectors[:, : K + 30].sum(1)
        within.append(found.error(inside) / off(found, top, inside))
        across.append(found.error(anywhere) / off(found, top, anywhere))
    assert min(within) > 1 / 6
    assert 0.4 < typical(within) < 3
    # What lies outside is taken as if it were all in the direction that is missing.
    assert min(across) > 1 / 2
    assert 1 < typical(across) < 10


@pytest.mark.parametrize("ratio", [0.3, 0.8, 0.96])
def test_eigenvalues_are_off_by_the_squared_residual_over_the_gap(ratio: float) -> None:
    for seed in range(4):
        operator, values, _ = problem(ratio, seed)
        found = top_eigenpairs(operator, K, tolerance=1e-3, seed=seed)
        assert found.eigenvalue_errors is not None
        true = (found.eigenvalues - values[:K]).abs()
        worst = int(true.argmax())
        assert 0.8 * true[worst] < found.eigenvalue_errors[worst] < 2 * true[worst]
        assert bool((found.eigenvalue_errors > true / 3 - 1e-12).all())


@pytest.mark.parametrize("tolerance", few(1, [3e-3, 1e-2, 1e-3]))
def test_a_far_negative_end_hides_no_error(tolerance: float) -> None:
    # As early in the training of a language model: what is missing is near 2, and nothing at -14.
    ratios = []
    for seed in range(24):
        generator = torch.Generator().manual_seed(seed)
        bulk = 0.3 * torch.randn(400, generator=generator, dtype=torch.float64)
        top = torch.tensor([25.0, 3.2, 2.8, 2.45, 2.3, 2.2, 2.05, 2.0, -14.0]).double()
        values = torch.cat([top, bulk])
        found = top_eigenpairs(DenseOperator(torch.diag(values)), 5, tolerance=tolerance, seed=seed)
        assert found.angles is not None
        # The sine of the angle between the last pair and the eigenspace.
        true = float((1 - found.basis[:5, 4].square().sum()).clamp(min=0).sqrt())
        ratios.append(float(found.angles[4]) / true)
    assert sum(ratio < 1 / 3 for ratio in ratios) <= len(ratios) // 4
    assert 0.4 < typical(ratios) < 4


def test_a_band_turns_towards_the_pairs_before_it_as_well() -> None:
    ratios = []
    for seed in range(8):
        operator, _, vectors = problem(0.8, seed)
        found = eigenpairs(operator, band=(2, 5), tolerance=1e-2, seed=seed, check_repeated=0)
        vector = vectors[:, :40] @ torch.ones(40, dtype=torch.float64)
        ratios.append(found.error(vector) / off(found, vectors[:, 2:5], vector))
    assert min(ratios) > 1 / 3
    assert 1 < typical(ratios) < 10


def test_in_the_metric_of_an_optimizer_it_is_the_error_in_that_metric() -> None:
    operator, _, vectors = problem(0.8)
    found = top_eigenpairs(operator, K, tolerance=1e-2)
    diagonal = torch.linspace(0.5, 2, SIZE, dtype=torch.float64)
    space, update = MetricSubspace(found, diagonal), vectors[:, :40].sum(1)
    root = diagonal.sqrt()
    assert space.error_update(update / root) == pytest.approx(found.error(update))
    assert space.error_gradient(update * root) == pytest.approx(found.error(update))
    # The dominant part of an update, D^-1/2 W W^T D^1/2 delta, against the true W.
    top = vectors[:, :K]
    true = top @ (top.T @ update) - root * space.split_update(update / root)[0]
    assert 1 < space.error_update(update / root) / float(true.norm() / update.norm()) < 10


def test_where_angles_are_not_known_no_error_is_claimed() -> None:
    space = random_subspace(20, 3, 0)
    assert math.isnan(space.error(torch.ones(20)))
    known = Subspace(space.basis, space.eigenvalues, angles=torch.zeros(3))
    assert known.error(torch.ones(20)) == 0.0
    assert known.error(torch.zeros(20)) == 0.0
    assert Subspace(space.basis, space.eigenvalues, angles=torch.ones(3)).error(torch.ones(20)) == 1


def residual(rows: Tensor, images: Tensor) -> float:
    """The largest of the first K pairs, relative to lambda_1."""
    values = (rows * images).sum(1)
    return float(((images - values[:, None] * rows).norm(dim=1) / values[0])[:K].max())


def test_a_solve_goes_on_to_a_finer_tolerance_that_its_values_ask_for() -> None:
    operator, values, _ = problem(0.9)
    asked: list[Tensor] = []

    def finer(found: Tensor) -> float:
        asked.append(found)
        return 1e-4 * float(found[-1] / found[0])

    def width(_: Tensor) -> int:
        return K

    coarse = solve_block(operator, K, width, tolerance=1e-2)
    fine = solve_block(operator, K, width, tolerance=1e-2, finer=finer)
    needed = 1e-4 * float(values[K - 1] / values[0])
    assert needed < residual(coarse.rows, coarse.images) < 1e-2
    assert residual(fine.rows, fine.images) < 1.01 * needed
    # Asked once, when the coarse one was met; and what is coarser changes nothing.
    assert [len(found) for found in asked] == [K]
    same = solve_block(operator, K, width, tolerance=1e-2, finer=lambda _: 0.1)
    assert torch.equal(same.rows, coarse.rows)
    # What the limit ends after the coarse tolerance was met is no solve that was cut.
    limited = solve_block(
        operator, K, width, tolerance=1e-2, finer=finer, max_matvecs=coarse.num_matvecs + 2
    )
    assert not limited.cut
    assert needed < residual(limited.rows, limited.images) < 1e-2


def test_a_finer_tolerance_stops_at_rounding() -> None:
    operator, _, _ = problem(0.3)
    single = DenseOperator((operator @ torch.eye(SIZE, dtype=torch.float64)).float())
    found = solve_block(single, K, lambda _: K, tolerance=1e-2, finer=lambda _: 1e-30)
    assert found.num_matvecs < 100
    assert residual(found.rows, found.images) < 20 * torch.finfo(torch.float32).eps
