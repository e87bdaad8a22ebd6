from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.curvature.networks import mlp
from thalweg.curvature.eigensolver import NotConverged, top_eigenpairs
from thalweg.curvature.objective import Objective
from thalweg.curvature.operators import DenseOperator, Hessian
from thalweg.curvature.subspace import Subspace
from thalweg.errors import Diverged, InvalidInput


def with_spectrum(values: Any, seed: int = 0) -> Tensor:
    """A random symmetric matrix with these eigenvalues, float64."""
    values = np.asarray(values, dtype=float)
    normal = np.random.default_rng(seed).standard_normal((len(values), len(values)))
    rotation = np.linalg.qr(normal)[0]
    matrix = (rotation * values) @ rotation.T
    return torch.from_numpy((matrix + matrix.T) / 2)


def expected(matrix: Tensor, k: int) -> np.ndarray:
    return scipy.linalg.eigh(matrix.double().numpy(), eigvals_only=True)[::-1][:k].copy()


def solve(matrix: Tensor, k: int, **options: Any) -> Subspace:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return top_eigenpairs(DenseOperator(matrix), k, **options)


def check(matrix: Tensor, found: Subspace, tolerance: float, rounding: float = 1e-12) -> None:
    """Eigenvalues against SciPy, and residuals against fresh products."""
    k = found.k
    values = expected(matrix, k)
    scale = abs(values[0])
    floor = rounding * float(torch.linalg.matrix_norm(matrix, 2))
    assert found.converged
    assert found.residuals is not None
    assert np.abs(found.eigenvalues.double().numpy() - values).max() <= tolerance * scale + floor
    product = matrix @ found.basis - found.basis * found.eigenvalues
    fresh = product.norm(dim=0) / scale
    assert float((fresh - found.residuals).abs().max()) <= floor / scale + 1e-3 * tolerance
    assert float(fresh.max()) <= tolerance + floor / scale
    identity = torch.eye(k, dtype=matrix.dtype)
    assert torch.allclose(found.basis.T @ found.basis, identity, atol=100 * rounding)


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 60), k=st.integers(1, 12), seed=st.integers(0, 10**6))
def test_random_symmetric_matrices_agree_with_scipy(size: int, k: int, seed: int) -> None:
    normal = torch.from_numpy(np.random.default_rng(seed).standard_normal((size, size)))
    matrix, k = normal + normal.T, min(k, size)
    if abs(expected(matrix, 1)[0]) < 1e-6:
        return
    check(matrix, solve(matrix, k, tolerance=1e-8, max_products=2000, seed=seed), 1e-8)


SPECTRA: dict[str, Any] = {
    "repeated on top": [5.0, 5, 5, 4, 3, 2, *np.linspace(-1, 1, 94)],
    "repeated twice": [5.0, 5, 4, 4, 3, 3, *np.linspace(-1, 1, 94)],
    "repeated last": [5.0, 4, 3, 3, 3, 2, *np.linspace(-1, 1, 94)],
    "many zeros": [5.0, 4, 3, *np.zeros(97)],
    "zeros among the top": [5.0, 4, *np.zeros(90), -1, -2, -3, -4, -5, -6, -7, -8],
    "negative definite": np.linspace(-1, -3, 100),
    "negative on the far side": [2.0, 1.5, 1.2, *np.linspace(0.1, -50, 97)],
    "clustered": [5.0, 4.9999, 4.9998, 1, *np.linspace(0, 0.5, 96)],
    "a flat tail, as of a network": [30.0, 12, 9, 5, 3.1, *np.geomspace(1, 1e-6, 95)],
    "a multiple of the identity": np.full(100, 2.0),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_difficult_spectra_agree_with_scipy(name: str, k: int, seed: int) -> None:
    matrix = with_spectrum(SPECTRA[name], seed)
    check(matrix, solve(matrix, k, tolerance=1e-7, max_products=3000, seed=seed), 1e-7)


def test_a_zero_matrix_has_zero_eigenvalues() -> None:
    found = solve(torch.zeros(50, 50, dtype=torch.float64), 3)
    assert found.converged
    assert not found.eigenvalues.any()


def test_a_top_eigenvalue_of_zero_above_negative_ones_converges() -> None:
    # The residual relative to lambda_1 = 0 has no meaning; rounding is relative to the norm.
    for dtype in (torch.float64, torch.float32):
        matrix = with_spectrum([0.0, -1, -1.5, *np.linspace(-2, -3, 97)]).to(dtype)
        found = solve(matrix, 2, max_products=2000)
        assert found.converged
        assert abs(float(found.eigenvalues[0])) < 1e-3


@pytest.mark.parametrize("size", [1, 2, 7, 30])
def test_all_eigenpairs_of_a_small_matrix_are_exact(size: int) -> None:
    matrix = with_spectrum(np.linspace(-1, 2, size))
    check(matrix, solve(matrix, size, tolerance=1e-10), 1e-12)


@pytest.mark.parametrize("basis_size", [8, 10, 14])
def test_a_small_basis_restarts_and_still_converges(basis_size: int) -> None:
    matrix = with_spectrum([3.0, 2.5, 2, 1.7, *np.linspace(-1, 1.2, 196)])
    found = solve(matrix, 4, tolerance=1e-8, basis_size=basis_size, max_products=5000)
    assert found.products > 2 * basis_size
    check(matrix, found, 1e-8)


def test_a_basis_too_small_to_hold_the_result_is_refused() -> None:
    matrix = with_spectrum(np.linspace(0, 1, 40))
    with pytest.raises(InvalidInput, match="basis_size: got 5"):
        solve(matrix, 4, basis_size=5)
    with pytest.raises(InvalidInput, match="basis_size: got 7"):
        solve(matrix, 4, basis_size=7, start=torch.eye(40, dtype=torch.float64)[:, :3])


def test_a_start_near_the_answer_saves_products() -> None:
    matrix = with_spectrum([9.0, 7, 5, *np.linspace(-1, 1, 297)])
    cold = solve(matrix, 3, tolerance=1e-6, check_repeated=0)
    warm = solve(matrix, 3, tolerance=1e-6, check_repeated=0, start=cold.basis)
    assert warm.products < cold.products
    check(matrix, warm, 1e-6)
    check(matrix, solve(matrix, 3, tolerance=1e-6, start=cold.basis[:, 1]), 1e-6)


def test_a_start_with_dependent_columns_serves() -> None:
    matrix = with_spectrum([9.0, 7, 5, *np.linspace(-1, 1, 97)])
    column = torch.ones(100, 1, dtype=torch.float64)
    check(matrix, solve(matrix, 3, tolerance=1e-7, start=column.expand(100, 2)), 1e-7)


def test_a_start_in_an_invariant_subspace_does_not_hide_the_rest() -> None:
    matrix = torch.diag(torch.tensor([3.0, 2, 1, *np.linspace(-1, 0, 57)], dtype=torch.float64))
    start = torch.zeros(60, dtype=torch.float64)
    start[10] = 1
    check(matrix, solve(matrix, 3, tolerance=1e-8, start=start), 1e-8)


def test_too_few_products_warn_and_the_residuals_stay_true() -> None:
    matrix = with_spectrum(np.linspace(0, 1, 300))
    with pytest.warns(NotConverged, match="20 products were not enough.*max_products"):
        found = top_eigenpairs(DenseOperator(matrix), 5, tolerance=1e-10, max_products=20)
    assert found.converged is False
    assert found.residuals is not None
    assert found.k == 5
    fresh = (matrix @ found.basis - found.basis * found.eigenvalues).norm(dim=0)
    scale = float(found.eigenvalues[0])
    assert torch.allclose(fresh / scale, found.residuals, rtol=1e-6)


def test_a_tolerance_below_rounding_warns_even_in_a_complete_basis() -> None:
    matrix = with_spectrum(np.linspace(0, 1, 12)).float()
    with pytest.warns(NotConverged):
        found = top_eigenpairs(DenseOperator(matrix), 3, tolerance=1e-14)
    assert found.converged is False


@pytest.mark.parametrize("k", [1, 4])
def test_an_operator_that_is_not_symmetric_is_refused(k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(40, 40, generator=generator, dtype=torch.float64)
    with pytest.raises(InvalidInput, match="a symmetric operator"):
        solve(matrix, k)


def test_an_operator_that_changes_between_products_is_refused() -> None:
    class Noisy(DenseOperator):
        def __matmul__(self, vectors: Tensor) -> Tensor:
            generator = torch.Generator().manual_seed(self.products)
            noise = 0.3 * torch.randn(40, 40, generator=generator, dtype=torch.float64)
            return super().__matmul__(vectors) + (noise + noise.T) @ vectors

    with pytest.raises(InvalidInput, match="the same at every product"):
        top_eigenpairs(Noisy(with_spectrum(np.linspace(0, 3, 40))), 3)


def test_nan_products_are_divergence() -> None:
    with pytest.raises(Diverged):
        solve(torch.full((5, 5), float("nan")), 2)
    with pytest.raises(Diverged):
        solve(torch.eye(5), 2, start=torch.full((5,), float("nan")))


def test_the_same_seed_gives_the_same_bits() -> None:
    matrix = with_spectrum([3.0, 2, *np.linspace(-1, 1, 98)]).float()
    first, second = (solve(matrix, 3, seed=5) for _ in range(2))
    assert torch.equal(first.basis, second.basis)
    assert torch.equal(first.eigenvalues, second.eigenvalues)
    assert not torch.equal(solve(matrix, 3, seed=6).basis, first.basis)


def test_the_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    solve(with_spectrum(np.full(30, 2.0)), 3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", SPECTRA)
def test_float32_converges_to_its_own_rounding(name: str) -> None:
    matrix = with_spectrum(SPECTRA[name]).float()
    check(matrix, solve(matrix, 3, tolerance=1e-4, max_products=3000), 1e-4, rounding=3e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k: got 0.*from 1 to"),
        ({"k": 6}, "k: got 6.*the number of parameters, 5"),
        ({"k": 2, "tolerance": 0.0}, "tolerance: got 0.0"),
        ({"k": 2, "max_products": 1}, "max_products: got 1.*>= k = 2"),
        ({"k": 2, "check_repeated": -1}, "check_repeated: got -1"),
        ({"k": 2, "start": torch.ones(4)}, r"start: got \(4,\)"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        top_eigenpairs(DenseOperator(torch.eye(5)), **options)


def test_products_are_counted() -> None:
    operator = DenseOperator(with_spectrum([3.0, 2, *np.linspace(-1, 1, 98)]))
    assert top_eigenpairs(operator, 2).products == operator.products


def test_the_hessian_of_a_network_agrees_with_scipy() -> None:
    case = mlp().to(torch.float64)
    loss = Objective(case.model, case.loss, case.data, chunk_size=4)
    matrix = Hessian(loss) @ torch.eye(loss.num_parameters, dtype=torch.float64)
    found = top_eigenpairs(Hessian(loss, keep_graph=True), 4, tolerance=1e-9, max_products=500)
    check((matrix + matrix.T) / 2, found, 1e-9)
