from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from thalweg import linalg
from thalweg.errors import Diverged, InvalidInput
from thalweg.operators.symmetric import DenseOperator
from thalweg.spectrum.krylov import Krylov, Ritz, Which, random_vector

SIZE = 30


def random_matrix(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)
    return matrix + matrix.T


def grown(matrix: Tensor, rounds: int, which: Which = "largest", room: int = 12) -> Krylov:
    """A Krylov space of one random vector after so many products, with restarts."""
    generator = torch.Generator().manual_seed(1)
    krylov = Krylov(DenseOperator(matrix), room, which)
    krylov.expand(random_vector(krylov.operator, generator))
    for _ in range(rounds - 1):
        block = krylov.remainder()
        krylov.make_room(2, 1)
        krylov.expand(krylov.outside(block, generator))
    return krylov


@pytest.mark.parametrize("rounds", [5, 12, 13, 40])
def test_basis_products_and_projected_matrix_stay_those_of_the_operator(rounds: int) -> None:
    matrix = random_matrix()
    krylov = grown(matrix, rounds)
    m = krylov.dimension
    basis = krylov.basis[:m].T
    assert krylov.num_matvecs == rounds
    assert torch.allclose(basis.T @ basis, torch.eye(m, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(krylov.images[:m].T, matrix @ basis, atol=1e-10)
    assert torch.allclose(krylov.projected[:m, :m], basis.T @ matrix @ basis, atol=1e-10)


@pytest.mark.parametrize("rounds", [5, 40])
def test_the_estimate_of_a_residual_is_the_actual_one_in_a_space_of_one_start(rounds: int) -> None:
    krylov = grown(random_matrix(), rounds)
    estimate, actual = (krylov.ritz(3, 1e-12, exact=exact) for exact in (False, True))
    assert estimate.residuals is None
    assert actual.residuals is not None
    assert estimate.residual == pytest.approx(actual.residual, rel=1e-6)


def vectors_of(krylov: Krylov, found: Ritz) -> Tensor:
    """The Ritz vectors as rows (k, P)."""
    return found.coefficients.T @ krylov.basis[: krylov.dimension]


def test_residuals_are_summed_over_blocks_of_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linalg, "CACHED_COLUMNS", 7)
    matrix = random_matrix()
    krylov = grown(matrix, 9)
    found = krylov.ritz(3, 1e-12, exact=True)
    vectors = vectors_of(krylov, found).T
    expected = matrix @ vectors - vectors * found.values
    norms = expected.norm(dim=0)
    assert found.residuals is not None
    assert found.worst is not None
    assert torch.allclose(found.residuals * found.values[0].abs(), norms, rtol=1e-8)
    assert torch.allclose(found.worst[:, 0], expected[:, int(norms.argmax())], atol=1e-10)


def test_the_subspace_found_outlives_the_basis_that_it_was_found_in() -> None:
    matrix = random_matrix()
    krylov = grown(matrix, 9)
    found = krylov.ritz(3, 1e-12, exact=True)
    vectors = vectors_of(krylov, found)
    subspace = krylov.subspace(found, 0, converged=False)
    assert krylov.basis.numel() == krylov.images.numel() == 0
    overlaps = (vectors @ subspace.basis).abs()
    assert torch.allclose(overlaps, torch.eye(3, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize(
    ("which", "first"), [("largest", 3.0), ("smallest", -7.0), ("magnitude", -7.0)]
)
def test_a_restart_keeps_what_is_wanted(which: Which, first: float) -> None:
    matrix = torch.diag(torch.cat([torch.tensor([3.0, -7.0]), torch.linspace(-1, 1, 28)])).double()
    krylov = grown(matrix, 12, which)
    before = krylov.ritz(1, 1e-3, exact=True)
    krylov.make_room(2, 1)
    after = krylov.ritz(1, 1e-3, exact=True)
    assert krylov.dimension < 12
    assert after.values.item() == pytest.approx(before.values.item())
    assert after.values.item() == pytest.approx(first, abs=1e-6)


def test_what_is_outside_of_a_nearly_whole_space_is_the_rest_of_it() -> None:
    krylov = grown(random_matrix(), SIZE - 1, room=SIZE)
    rest = krylov.outside(torch.ones(SIZE, 3).double(), torch.Generator().manual_seed(0))
    assert rest.shape == (SIZE, 1)
    assert float((krylov.basis[: SIZE - 1] @ rest).abs().max()) < 1e-12
    krylov.expand(rest)
    assert krylov.complete


def test_gross_asymmetry_is_noticed_at_the_second_product() -> None:
    generator = torch.Generator().manual_seed(0)
    operator = DenseOperator(torch.randn(SIZE, SIZE, generator=generator).double())
    krylov = Krylov(operator, 12, "largest")
    krylov.expand(random_vector(operator, generator))
    with pytest.raises(InvalidInput, match=r"u\^T A v and v\^T A u that differ by"):
        krylov.expand(krylov.outside(krylov.remainder(), generator))


def test_slight_asymmetry_is_refused_unless_the_tolerance_allows_it() -> None:
    # As of products in bfloat16.
    matrix = random_matrix()
    skew = torch.triu(torch.full_like(matrix, 0.01 * float(matrix.norm()) / SIZE), 1)
    krylov = grown(matrix + skew - skew.T, 8)
    with pytest.raises(InvalidInput, match="a symmetric operator, the same at every product"):
        krylov.ritz(2, 1e-3, exact=True)
    assert krylov.ritz(2, 5e-2, exact=True).residuals is not None


class Returning(DenseOperator):
    """An operator whose products are something else."""

    def __init__(self, product: Any) -> None:
        super().__init__(torch.eye(SIZE))
        self.product = product

    def __matmul__(self, vectors: Tensor) -> Tensor:
        return self.product(vectors)


@pytest.mark.parametrize(
    ("product", "given"),
    [
        (lambda v: v[:, 0], r"shape \(30,\), torch.float32 on cpu"),
        (lambda v: v.double(), r"shape \(30, 1\), torch.float64 on cpu"),
        (lambda v: v.to("meta"), r"shape \(30, 1\), torch.float32 on meta"),
    ],
)
def test_a_product_of_another_shape_dtype_or_device_is_refused(product: Any, given: str) -> None:
    krylov = Krylov(Returning(product), 5, "largest")
    with pytest.raises(
        InvalidInput, match=f"{given}.*allowed: shape .30, 1., torch.float32 on cpu"
    ):
        krylov.expand(torch.eye(SIZE)[:, :1])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_product_that_is_not_finite_is_divergence(value: float) -> None:
    krylov = Krylov(Returning(lambda v: torch.full_like(v, value)), 5, "largest")
    with pytest.raises(Diverged, match="NaN or infinite"):
        krylov.expand(torch.eye(SIZE)[:, :1])


def test_random_vectors_are_unit_and_the_same_in_every_dtype() -> None:
    single, double = (
        random_vector(DenseOperator(torch.eye(SIZE, dtype=d)), torch.Generator().manual_seed(4))
        for d in (torch.float32, torch.float64)
    )
    assert double.norm().item() == pytest.approx(1)
    assert torch.equal(single, double.float())
