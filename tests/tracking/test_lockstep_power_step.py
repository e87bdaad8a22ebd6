from __future__ import annotations

import pytest
import torch
from torch import Tensor

from thalweg.errors import Diverged
from thalweg.linalg import orthonormalize
from thalweg.tracking.lockstep_power_step import LockstepStep, lockstep_power_step, power_step_by_qr
from thalweg.tracking.power_step import power_step

SIZE, K = 40, 3
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
    noise = 0.03 * torch.randn(len(SPECTRA), SIZE, K, dtype=torch.float64)
    near = [orthonormalize(block).T for block in vectors[:, :, :K] + noise]
    return matrices, vectors[:, :, :K], torch.stack(near).contiguous()


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
        alone = power_step(rows[run], rows[run] @ matrices[run], K)
        assert torch.allclose(projectors(step.rows[run]), projectors(alone.rows), atol=1e-12)
        assert torch.allclose(values[run], alone.eigenvalues, rtol=1e-10)
        assert torch.allclose(step.eigenvalues()[run], alone.eigenvalues, rtol=1e-10)
        assert torch.allclose(vectors[run].abs(), alone.rows.abs(), atol=1e-8)


def test_the_bases_are_orthonormal_and_what_the_combination_makes_of_the_images(
    problem: tuple[Tensor, Tensor, Tensor],
) -> None:
    matrices, _, rows = problem
    images = rows @ matrices
    for step in (lockstep_power_step(rows, images), power_step_by_qr(rows, images)):
        identity = torch.eye(K, dtype=torch.float64).expand(len(SPECTRA), K, K)
        assert torch.allclose(step.rows @ step.rows.mT, identity, atol=1e-12)
        assert torch.allclose(step.combination.mT @ images, step.rows, atol=1e-10)


def test_power_steps_converge_to_each_runs_eigenspace(
    problem: tuple[Tensor, Tensor, Tensor],
) -> None:
    matrices, vectors, rows = problem
    for step in (lockstep_power_step, power_step_by_qr):
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
    step = power_step_by_qr(rows, images)
    assert torch.allclose(step.rows @ step.rows.mT, torch.eye(2, dtype=torch.float64))
    assert torch.allclose(step.eigenvalues(), torch.tensor([[3.0, 2], [3, 0]]).double())


def test_a_run_that_diverged_is_named() -> None:
    rows = torch.eye(4)[:2].expand(3, 2, 4).contiguous()
    images = rows.clone()
    images[1, 0, 0] = torch.nan
    assert lockstep_power_step(rows, images).sound.tolist() == [True, False, True]
    with pytest.raises(Diverged, match="in run 1"):
        power_step_by_qr(rows, images)


def test_the_estimated_sampling_error_is_what_the_difference_does_to_the_projection(
    problem: tuple[Tensor, Tensor, Tensor],
) -> None:
    # Against the step made from images that are off by the difference, to first order.
    matrices, _, rows = problem
    images = rows @ matrices
    vectors = torch.randn(len(SPECTRA), SIZE, dtype=torch.float64)
    difference = 1e-5 * torch.randn_like(images)
    step = lockstep_power_step(rows, images, difference)
    off = LockstepStep.project(lockstep_power_step(rows, images + difference), vectors)
    expected = (off - step.project(vectors)).norm(dim=1) / vectors.norm(dim=1)
    sampling, moved = step.errors(vectors)
    # M changes with the images as well, of second order in the distance of U from C.
    assert torch.allclose(sampling, expected, rtol=0.05)
    before = torch.einsum("rkp,rkq,rq->rp", rows, rows, vectors)
    away = (step.project(vectors) - before).norm(dim=1) / vectors.norm(dim=1)
    assert torch.allclose(moved, away, rtol=1e-9)
