from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thalweg.errors import Diverged, InvalidInput
from thalweg.linalg import orthonormalize
from thalweg.spectrum.subspace import Subspace, random_subspace

DIMENSIONS = st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(0, 10**6)).map(
    lambda t: (max(t[0], t[1]), min(t[0], t[1]), t[2])
)


def space(size: int, k: int, seed: int = 0) -> Subspace:
    return random_subspace(size, k, seed, dtype=torch.float64)


def vector(size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randn(size, generator=generator, dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(DIMENSIONS)
def test_the_projection_is_idempotent_and_symmetric(case: tuple[int, int, int]) -> None:
    size, k, seed = case
    subspace, v, w = space(size, k, seed), vector(size, seed), vector(size, seed + 1)
    projected = subspace.project(v)
    assert torch.allclose(subspace.project(projected), projected, atol=1e-12)
    assert float(subspace.project(subspace.reject(v)).norm()) < 1e-11
    assert math.isclose(float(w @ projected), float(v @ subspace.project(w)), abs_tol=1e-11)


@settings(max_examples=40, deadline=None)
@given(DIMENSIONS)
def test_the_parts_sum_to_the_whole_and_their_squares_to_one(case: tuple[int, int, int]) -> None:
    size, k, seed = case
    subspace, v = space(size, k, seed), vector(size, seed)
    dominant, bulk = subspace.split(v)
    assert torch.allclose(dominant + bulk, v, atol=1e-13)
    fraction = float(bulk.norm() / v.norm())
    assert math.isclose(subspace.alignment(v) ** 2 + fraction**2, 1.0, abs_tol=1e-10)
    assert torch.equal(subspace.reject(v), bulk)


@settings(max_examples=40, deadline=None)
@given(DIMENSIONS)
def test_overlap_is_symmetric_and_blind_to_the_basis(case: tuple[int, int, int]) -> None:
    size, k, seed = case
    first, second = space(size, k, seed), space(size, max(1, k // 2), seed + 1)
    turn = space(k, k, seed + 2).basis
    turned = Subspace(first.basis @ turn, first.eigenvalues)
    assert math.isclose(first.overlap(second), second.overlap(first), abs_tol=1e-12)
    assert math.isclose(turned.overlap(second), first.overlap(second), abs_tol=1e-12)
    assert math.isclose(turned.overlap(first), 1.0, abs_tol=1e-12)


def test_overlap_is_the_mean_squared_cosine_of_principal_angles() -> None:
    first, second = space(20, 4), space(20, 4, 1)
    cosines = torch.linalg.svdvals(first.basis.T @ second.basis)
    assert math.isclose(first.overlap(second), float(cosines.square().mean()), rel_tol=1e-12)


def test_overlap_of_a_part_with_the_whole_is_one_and_of_complements_zero() -> None:
    identity = torch.eye(6, dtype=torch.float64)
    part = Subspace(identity[:, :2], torch.ones(2))
    assert part.overlap(Subspace(identity[:, :5], torch.ones(5))) == 1.0
    assert part.overlap(Subspace(identity[:, 2:4], torch.ones(2))) == 0.0


def test_overlap_with_a_subspace_of_another_space_is_refused() -> None:
    with pytest.raises(InvalidInput, match="P = 7"):
        space(6, 2).overlap(space(7, 2))


def test_vectors_shaped_like_parameters_keep_their_shape() -> None:
    subspace = space(8, 3)
    v = vector(8)
    listed = [v[:6].reshape(2, 3), v[6:]]
    named = {"weight": listed[0], "bias": listed[1]}
    expected = subspace.project(v)
    dominant = subspace.project(listed)
    assert torch.equal(dominant[0], expected[:6].reshape(2, 3))
    assert torch.equal(dominant[1], expected[6:])
    rest = subspace.reject(named)
    assert list(rest) == ["weight", "bias"]
    assert torch.equal(rest["weight"], (v - expected)[:6].reshape(2, 3))
    assert subspace.alignment(named) == subspace.alignment(v)


def test_a_block_is_split_column_by_column() -> None:
    subspace = space(9, 2)
    block = torch.stack([vector(9, 0), vector(9, 1)], dim=1)
    columns = [subspace.project(block[:, i]) for i in range(2)]
    assert torch.allclose(subspace.project(block), torch.stack(columns, dim=1), atol=1e-15)


def test_the_alignment_of_a_random_vector_is_near_the_square_root_of_k_over_p() -> None:
    size, k = 4000, 40
    values = [space(size, k, seed).alignment(vector(size, seed)) for seed in range(10)]
    assert abs(sum(values) / 10 / math.sqrt(k / size) - 1) < 0.1


def test_the_alignment_of_a_tiny_gradient_does_not_underflow() -> None:
    v = torch.full((4,), 1e-30)
    assert abs(random_subspace(4, 4, 0).alignment(v) - 1) < 1e-6


def test_the_alignment_of_a_zero_or_nan_vector_is_nan() -> None:
    # min(1.0, nan) is 1.0: a diverged gradient must not look perfectly aligned.
    subspace = space(5, 2)
    assert math.isnan(subspace.alignment(torch.zeros(5, dtype=torch.float64)))
    assert math.isnan(subspace.alignment(torch.full((5,), float("nan"), dtype=torch.float64)))
    assert math.isnan(subspace.alignment(torch.full((5,), float("inf"), dtype=torch.float64)))


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(InvalidInput, match=r"shapes \(P, k\) and \(k,\)"):
        Subspace(torch.eye(3)[:, :2], torch.ones(3))
    with pytest.raises(InvalidInput, match="a length of P = 5"):
        space(5, 2).project(torch.zeros(4))


def test_every_basis_is_stored_column_by_column() -> None:
    # Rounding depends on strides: a resumed run must round as the undisturbed one does.
    for basis in (torch.eye(5)[:, :2], torch.eye(5)[:, :2].T.contiguous().T, torch.rand(2, 5).T):
        assert Subspace(basis, torch.ones(2)).basis.stride() == (1, 5)


def test_orthonormalize_spans_the_same_and_refuses_nan() -> None:
    block = torch.randn(7, 3, dtype=torch.float64)
    basis = orthonormalize(block)
    assert torch.allclose(basis.T @ basis, torch.eye(3, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(basis @ (basis.T @ block), block, atol=1e-12)
    with pytest.raises(Diverged):
        orthonormalize(torch.full((3, 1), float("nan")))


def test_a_subspace_says_what_it_is() -> None:
    known = Subspace(torch.eye(4)[:, :1], torch.tensor([2.0]), torch.tensor([1e-4]), 7, True)
    assert repr(known) == (
        "Subspace(P=4, k=1, eigenvalues=[2], residual<=1.0e-04, converged=True, num_matvecs=7)"
    )


@pytest.mark.parametrize("k", [0, 6])
def test_more_random_directions_than_there_are_or_none_are_refused(k: int) -> None:
    with pytest.raises(InvalidInput, match=f"k: got {k}, allowed: an integer from 1 to P = 5"):
        random_subspace(5, k, seed=0)


def test_random_directions_are_those_of_the_seed_in_every_dtype() -> None:
    single, double = (random_subspace(30, 4, 7, dtype=t) for t in (torch.float32, torch.float64))
    assert single.basis.dtype == torch.float32
    assert torch.allclose(single.basis.double(), double.basis, atol=1e-6)
    assert not torch.allclose(double.basis, random_subspace(30, 4, 8, dtype=torch.float64).basis)
    assert double.eigenvalues.isnan().all()
