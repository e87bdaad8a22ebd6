"""One warm power step of a basis, and of one vector's projection."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from thalweg.errors import Diverged
from thalweg.linalg import _in_blocks, inner_products, orthonormalize
from thalweg.operators.symmetric import DenseOperator
from thalweg.tracking.power_step import (
    PowerStep,
    lockstep_power_step,
    lockstep_power_step_by_qr,
    power_step,
)

SIZE, K = 40, 4


def matrix(bulk: float) -> Tensor:
    """Diagonal: S_k is spanned by the first k axes, lambda_{k+1} / lambda_k is `bulk`."""
    top = torch.tensor([8.0, 5.0, 3.0, 1.0], dtype=torch.float64)
    return torch.diag(torch.cat([top, torch.linspace(-bulk, bulk, SIZE - K).double()]))


def tilted(angle: float) -> Tensor:
    """An orthonormal basis as rows (k, P), off S_k by about `angle`."""
    noise = torch.randn(SIZE, K, generator=torch.Generator().manual_seed(0)).double()
    return orthonormalize(torch.eye(SIZE, K).double() + angle * noise / noise.norm(dim=0)).T


def refined_error(bulk: float, angle: float) -> float:
    """How far the refined projection of a vector of length about 1 is from P_k v."""
    hessian, rows = matrix(bulk), tilted(angle)
    vector = torch.randn(SIZE, generator=torch.Generator().manual_seed(1)).double() / SIZE**0.5
    ritz = torch.linalg.eigh(rows @ hessian @ rows.T)
    step = PowerStep(ritz.eigenvectors.T @ rows, ritz.eigenvalues)
    refined = step.refined_projection(DenseOperator(hessian), vector)
    truth = torch.cat([vector[:K], torch.zeros(SIZE - K)])
    return float((refined - truth).norm())


def test_without_a_bulk_the_refined_projection_is_wrong_in_second_order_only() -> None:
    errors = [refined_error(0.0, angle) for angle in (0.04, 0.02, 0.01)]
    assert errors[0] < 0.01
    assert errors[1] == pytest.approx(errors[0] / 4, rel=0.2)
    assert errors[2] == pytest.approx(errors[1] / 4, rel=0.1)


def test_a_bulk_leaves_its_share_of_the_basis_error() -> None:
    angle, bulk = 0.01, 0.3
    assert refined_error(bulk, angle) < bulk * angle
    assert refined_error(bulk, angle) > refined_error(0.0, angle)


def test_the_step_damps_what_is_off_by_the_ratio_of_eigenvalues() -> None:
    bulk, hessian, rows = 0.1, matrix(0.1), tilted(0.05)
    step = power_step(rows, rows @ hessian, K)
    before, after = rows[:, K:].norm(), step.rows[:, K:].norm()
    assert after < 1.1 * bulk * before
    assert torch.allclose(step.rows @ step.rows.T, torch.eye(K).double(), atol=1e-12)
    top = torch.tensor([8.0, 5.0, 3.0, 1.0], dtype=torch.float64)
    assert torch.allclose(step.eigenvalues, top, rtol=1e-3)


def test_a_basis_that_spans_an_eigenspace_stays() -> None:
    rows = torch.eye(K, SIZE).double()
    step = power_step(rows, rows @ matrix(0.5), K)
    assert torch.allclose(step.rows.abs(), rows)


def test_blocks_of_columns_sum_to_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(3, 20_000, generator=generator).double()
    second = torch.randn(5, 20_000, generator=generator).double()
    assert torch.allclose(inner_products(first, second), first @ second.T)


@pytest.mark.parametrize("columns", [4096, 5000])
def test_blocks_of_columns_as_a_batch_sum_to_the_whole(columns: int) -> None:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(2, 3, columns, generator=generator)
    second = torch.randn(2, 5, columns, generator=generator)
    expected = first.double() @ second.double().mT
    product = _in_blocks(first, second, 2)
    assert product.dtype == torch.float64
    assert torch.allclose(product, expected, atol=1e-3)


def test_products_that_are_not_finite_are_divergence() -> None:
    rows = tilted(0.01)
    with pytest.raises(Diverged, match="NaN or infinite"):
        power_step(rows, rows * torch.inf, K)


# Runs in lockstep.

RANK = 3
SPECTRA = [[9.0, 6.0, 4.0], [5.0, 3.0, 2.9], [100.0, 2.0, 1.0]]


def symmetric(top: list[float]) -> tuple[Tensor, Tensor]:
    """A matrix with these top eigenvalues, and its eigenvectors as columns."""
    values = torch.cat([torch.tensor(top), torch.linspace(-0.4, 0.4, SIZE - len(top))]).double()
    vectors = torch.linalg.qr(torch.randn(SIZE, SIZE, dtype=torch.float64))[0]
    return (vectors * values) @ vectors.T, vectors


@pytest.fixture
def problem() -> tuple[Tensor, Tensor, Tensor]:
    """A matrix of each run, its top eigenvectors, and bases near them as rows."""
    torch.manual_seed(0)
    pairs = [symmetric(top) for top in SPECTRA]
    matrices, vectors = (torch.stack(parts) for parts in zip(*pairs, strict=True))
    noise = 0.03 * torch.randn(len(SPECTRA), SIZE, RANK, dtype=torch.float64)
    near = [orthonormalize(block).T for block in vectors[:, :, :RANK] + noise]
    return matrices, vectors[:, :, :RANK], torch.stack(near).contiguous()


def projectors(rows: Tensor) -> Tensor:
    return rows.mT @ rows


def test_every_run_makes_the_step_it_makes_by_itself(
    problem: tuple[Tensor, Tensor, Tensor],
) -> None:
    matrices, _, rows = problem
    step = lockstep_power_step(rows, rows @ matrices)
    values, vectors = step.eigenpairs()
    assert bool(step.sound.all())
    for run in range(len(SPECTRA)):
        alone = power_step(rows[run], rows[run] @ matrices[run], RANK)
        assert torch.allclose(projectors(step.rows[run]), projectors(alone.rows), atol=1e-12)
        assert torch.allclose(values[run], alone.eigenvalues, rtol=1e-10)
        assert torch.allclose(step.eigenvalues()[run], alone.eigenvalues, rtol=1e-10)
        assert torch.allclose(vectors[run].abs(), alone.rows.abs(), atol=1e-8)


def test_the_bases_are_orthonormal_and_what_the_combination_makes_of_the_images(
    problem: tuple[Tensor, Tensor, Tensor],
) -> None:
    matrices, _, rows = problem
    images = rows @ matrices
    for step in (lockstep_power_step(rows, images), lockstep_power_step_by_qr(rows, images)):
        identity = torch.eye(RANK, dtype=torch.float64).expand(len(SPECTRA), RANK, RANK)
        assert torch.allclose(step.rows @ step.rows.mT, identity, atol=1e-12)
        assert torch.allclose(step.combination.mT @ images, step.rows, atol=1e-10)


def test_power_steps_converge_to_each_runs_eigenspace(
    problem: tuple[Tensor, Tensor, Tensor],
) -> None:
    matrices, vectors, rows = problem
    for step in (lockstep_power_step, lockstep_power_step_by_qr):
        moved = rows
        for _ in range(20):
            moved = step(moved, moved @ matrices).rows
        distance = (projectors(moved) - projectors(vectors.mT)).norm(dim=(1, 2))
        assert float(distance.max()) < 1e-7


def test_a_vanishing_eigenvalue_is_unsound_and_left_to_qr() -> None:
    rows = torch.eye(4, dtype=torch.float64)[:2].expand(2, 2, 4).contiguous()
    matrices = torch.diag_embed(torch.tensor([[3.0, 2.0, 0, 0], [3.0, 0, 0, 0]]).double())
    images = rows @ matrices
    assert lockstep_power_step(rows, images).sound.tolist() == [True, False]
    step = lockstep_power_step_by_qr(rows, images)
    assert torch.allclose(step.rows @ step.rows.mT, torch.eye(2, dtype=torch.float64))
    assert torch.allclose(step.eigenvalues(), torch.tensor([[3.0, 2], [3, 0]]).double())


def test_a_run_that_diverged_is_named() -> None:
    rows = torch.eye(4)[:2].expand(3, 2, 4).contiguous()
    images = rows.clone()
    images[1, 0, 0] = torch.nan
    assert lockstep_power_step(rows, images).sound.tolist() == [True, False, True]
    with pytest.raises(Diverged, match="in run 1"):
        lockstep_power_step_by_qr(rows, images)
