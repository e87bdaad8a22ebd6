from __future__ import annotations

import pytest
import torch
from torch import Tensor

from thalweg.contrib.training_jacobian.polar_decomposition import polar_factor, svd_by_polar
from thalweg.spectrum.subspace import random_subspace

SIZE = 60
SPECTRA = {
    "of a training Jacobian": [300.0, 20.0, 2.0, *[1.0] * 20, *[1 + 1e-7] * 10, *[1e-9] * 5],
    "graded": [10.0 ** (3 - rank / 4) for rank in range(SIZE)],
    "singular": [2.0] * 30,
    "all one": [1.0] * SIZE,
    "nothing": [],
}


def orthogonal(seed: int) -> Tensor:
    return random_subspace(SIZE, SIZE, seed, dtype=torch.float64).basis


@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=list(SPECTRA))
def test_it_is_as_accurate_as_that_of_lapack(spectrum: list[float]) -> None:
    sigma = torch.zeros(SIZE).double()
    sigma[: len(spectrum)] = torch.tensor(spectrum).double()
    matrix = orthogonal(1) @ torch.diag(sigma) @ orthogonal(2).T
    left, values, right = svd_by_polar(matrix)
    scale = max(float(sigma.max()), 1e-300)
    assert (values - torch.linalg.svdvals(matrix)).abs().max() < 1e-14 * scale
    assert bool((values[:-1] >= values[1:]).all())
    assert (left @ torch.diag(values) @ right - matrix).abs().max() < 1e-13 * scale
    one = torch.eye(SIZE).double()
    for vectors in (left, right):
        assert (vectors.T @ vectors - one).abs().max() < 1e-13


def test_the_factor_of_a_rotation_times_a_stretch_is_the_rotation() -> None:
    rotation, vectors = orthogonal(3), orthogonal(4)
    stretch = vectors @ torch.diag(torch.linspace(0.01, 50, SIZE).double()) @ vectors.T
    assert torch.allclose(polar_factor(rotation @ stretch), rotation, atol=1e-12)


def test_float32_stays_float32() -> None:
    matrix = torch.diag(torch.tensor([3.0, 0.5]))
    left, values, right = svd_by_polar(matrix)
    assert {part.dtype for part in (left, values, right)} == {torch.float32}
    assert values.tolist() == pytest.approx([3.0, 0.5], rel=1e-6)
