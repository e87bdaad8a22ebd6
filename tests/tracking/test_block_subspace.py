from __future__ import annotations

import numpy as np
import pytest
import torch

from thalweg.errors import InvalidInput
from thalweg.spectrum.subspace import Subspace
from thalweg.tracking.block_subspace import principal_directions

BLOCKS = (7, 1, 12)
SCALES = torch.tensor([3.0, 2.0, 1.0, 0.5, 0.4, 0.3])


def vectors(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(6, 20, generator=generator, dtype=torch.float64)
    return (torch.randn(15, 6, generator=generator, dtype=torch.float64) * SCALES @ mixing + 5).to(
        dtype
    )


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_directions_of_each_block_are_those_of_its_singular_value_decomposition(
    dtype: torch.dtype, centered: bool
) -> None:
    given = vectors(dtype)
    space = principal_directions(given, 2, blocks=BLOCKS, centered=centered)
    assert space.blocks == BLOCKS
    assert [len(rows) for rows in space.rows] == [2, 1, 2]
    for rows, block in zip(space.rows, given.double().split(BLOCKS, dim=1), strict=True):
        array = block.numpy() - block.numpy().mean(axis=0) * centered
        right = np.linalg.svd(array, full_matrices=False)[2][: len(rows)]
        expected = right.T @ right
        np.testing.assert_allclose((rows.T @ rows).numpy(), expected, atol=1e-4)
    values = np.linalg.svd(
        given.double().numpy()[:, :7] - given.double().numpy()[:, :7].mean(0) * centered
    )[1]
    np.testing.assert_allclose(space.eigenvalues[:2].numpy(), values[:2] ** 2 / 15, rtol=1e-4)


def test_projections_are_those_on_the_block_diagonal_basis() -> None:
    space = principal_directions(vectors(), 3, blocks=BLOCKS)
    dense = Subspace(space.basis, space.eigenvalues)
    assert torch.allclose(dense.basis.T @ dense.basis, torch.eye(space.k, dtype=torch.float64))
    block = vectors()[:4].T
    for vector in (block[:, 0], block):
        for ours, theirs in zip(space.split(vector), dense.split(vector), strict=True):
            torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(space.coordinates(vector), dense.coordinates(vector))
    assert space.alignment(block[:, 0]) == pytest.approx(dense.alignment(block[:, 0]))
    assert space.overlap(dense) == pytest.approx(1.0)
    assert space.to("cpu").overlap(space) == pytest.approx(1.0)
    dominant, bulk = space.split(block[:, 0])
    assert abs(float(dominant @ bulk)) < 1e-9


def test_directions_that_the_vectors_do_not_span_are_left_out() -> None:
    two = torch.zeros(6, 4)
    two[:, 0] = torch.arange(6.0)
    two[0, 1] = 9.0
    assert principal_directions(two, 3).k == 2
    still = principal_directions(torch.ones(6, 4), 3)
    assert still.k == 0
    vector = torch.arange(4.0)
    assert still.split(vector)[0].tolist() == [0.0] * 4
    assert torch.equal(still.split(vector)[1], vector)
    assert principal_directions(torch.ones(6, 4), 3, centered=False).k == 1


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(InvalidInput, match="sizes of sum P = 20"):
        principal_directions(vectors(), 2, blocks=(7, 12))
    with pytest.raises(InvalidInput, match="k: got 0"):
        principal_directions(vectors(), 0)
    with pytest.raises(InvalidInput, match="length of P = 20"):
        principal_directions(vectors(), 2).coordinates(torch.ones(3))
