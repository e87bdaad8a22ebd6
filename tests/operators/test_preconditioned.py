from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from thalweg.errors import InvalidInput
from thalweg.operators.preconditioned import Preconditioned
from thalweg.operators.symmetric import DenseOperator
from thalweg.spectrum.eigensolver import top_eigenpairs
from thalweg.spectrum.metric_subspace import MetricSubspace
from thalweg.spectrum.subspace import Subspace

SIZE = 12


def symmetric(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)
    return matrix + matrix.T


def positive(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(SIZE, generator=generator, dtype=torch.float64) * 5 + 0.01


def test_it_is_the_matrix_scaled_on_both_sides() -> None:
    matrix, diagonal = symmetric(), positive()
    expected = torch.diag(diagonal**-0.5) @ matrix @ torch.diag(diagonal**-0.5)
    operator = Preconditioned(DenseOperator(matrix), diagonal)
    assert torch.allclose(operator @ torch.eye(SIZE, dtype=torch.float64), expected)
    assert torch.allclose(operator @ torch.ones(SIZE, dtype=torch.float64), expected.sum(1))


def test_a_shift_adds_a_multiple_of_the_identity_before_scaling() -> None:
    matrix, diagonal = symmetric(), positive()
    shifted = matrix + 0.3 * torch.eye(SIZE, dtype=torch.float64)
    vector = torch.ones(SIZE, dtype=torch.float64)
    found = Preconditioned(DenseOperator(matrix), diagonal, shift=0.3) @ vector
    assert torch.allclose(found, Preconditioned(DenseOperator(shifted), diagonal) @ vector)


def metric_subspace(seed: int) -> tuple[MetricSubspace, Tensor, Tensor]:
    matrix, diagonal = symmetric(seed), positive(seed)
    solved = top_eigenpairs(Preconditioned(DenseOperator(matrix), diagonal), 3, tolerance=1e-10)
    return MetricSubspace(solved, diagonal), matrix, diagonal


@given(st.integers(0, 30))
def test_the_split_is_orthogonal_in_the_metric(seed: int) -> None:
    space, _, diagonal = metric_subspace(seed)
    generator = torch.Generator().manual_seed(seed + 100)
    update, gradient = torch.randn(2, SIZE, generator=generator, dtype=torch.float64)
    dominant, bulk = space.split_update(update)
    assert torch.allclose(dominant + bulk, update)
    assert abs(float(dominant @ (diagonal * bulk))) < 1e-9
    steep, flat = space.split_gradient(gradient)
    assert torch.allclose(steep + flat, gradient)
    assert abs(float(steep @ (flat / diagonal))) < 1e-9
    # <delta, g> falls into the two parts without cross terms.
    assert math.isclose(float(update @ gradient), float(dominant @ steep + bulk @ flat))
    assert torch.allclose(space.split_update(dominant)[0], dominant)
    for chi, part, whole in (
        (space.alignment_update(update), dominant * diagonal**0.5, update * diagonal**0.5),
        (space.alignment_gradient(gradient), steep * diagonal**-0.5, gradient * diagonal**-0.5),
    ):
        assert math.isclose(chi, float(part.norm() / whole.norm()))


def test_a_newton_step_maps_the_split_of_a_gradient_to_that_of_the_update() -> None:
    # delta = -D^-1 g: the parts of the update are those of the gradient, preconditioned.
    space, _, diagonal = metric_subspace(3)
    gradient = torch.arange(1.0, SIZE + 1, dtype=torch.float64)
    steep, flat = space.split_gradient(gradient)
    dominant, bulk = space.split_update(-gradient / diagonal)
    assert torch.allclose(dominant, -steep / diagonal)
    assert torch.allclose(bulk, -flat / diagonal)


def test_with_the_unit_metric_it_is_the_plain_split() -> None:
    basis = torch.linalg.qr(symmetric())[0][:, :3]
    plain = Subspace(basis, torch.ones(3, dtype=torch.float64))
    metric = MetricSubspace(plain, torch.ones(SIZE, dtype=torch.float64))
    vector = torch.arange(1.0, SIZE + 1, dtype=torch.float64)
    for split in (metric.split_update, metric.split_gradient):
        assert torch.allclose(split(vector)[0], plain.project(vector))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d[:-1], r"diagonal: got \(11,\)"),
        (lambda d: d.index_fill(0, torch.tensor(4), 0.0), "0 at 4.*eps"),
        (lambda d: d.index_fill(0, torch.tensor(2), -1.0), "-1 at 2"),
        (lambda d: d.index_fill(0, torch.tensor(1), math.nan), "nan at 1"),
        (lambda d: d.index_fill(0, torch.tensor(1), math.inf), "inf at 1"),
        (lambda d: d.to("meta"), "on meta"),
    ],
)
def test_an_unfit_diagonal_is_refused(change, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        Preconditioned(DenseOperator(symmetric()), change(positive()))
