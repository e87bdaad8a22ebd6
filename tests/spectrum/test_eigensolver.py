from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import scipy.sparse.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.networks import mlp
from tests.sampling import few
from thalweg.errors import Diverged, InvalidInput
from thalweg.loss.objective import Objective
from thalweg.operators.hessian import Hessian
from thalweg.operators.symmetric import DenseOperator
from thalweg.spectrum.eigensolver import NotConverged, eigenpairs, top_eigenpairs
from thalweg.spectrum.krylov import Which
from thalweg.spectrum.subspace import Subspace

WHICH: tuple[Which, ...] = ("largest", "smallest", "magnitude")


def with_spectrum(values: Any, seed: int = 0) -> Tensor:
    """A random symmetric matrix with these eigenvalues, float64."""
    values = np.asarray(values, dtype=float)
    normal = np.random.default_rng(seed).standard_normal((len(values), len(values)))
    rotation = np.linalg.qr(normal)[0]
    matrix = (rotation * values) @ rotation.T
    return torch.from_numpy((matrix + matrix.T) / 2)


def wanted(values: np.ndarray, which: Which) -> np.ndarray:
    """The key by which eigenvalues are ordered, descending."""
    return {"largest": values, "smallest": -values, "magnitude": np.abs(values)}[which]


def in_order(matrix: Tensor, which: Which = "largest") -> np.ndarray:
    """All eigenvalues by SciPy, the most wanted first."""
    values = scipy.linalg.eigh(matrix.double().numpy(), eigvals_only=True)
    return values[np.argsort(-wanted(values, which), kind="stable")]


def solve(matrix: Tensor, k: int | None = None, **options: Any) -> Subspace:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return eigenpairs(DenseOperator(matrix), k, **options)


def check(
    matrix: Tensor,
    found: Subspace,
    tolerance: float,
    *,
    which: Which = "largest",
    first: int = 0,
    rounding: float = 1e-12,
) -> None:
    """Eigenvalues against SciPy; residuals and orthonormality by fresh products."""
    everything = in_order(matrix, which)
    norm = np.abs(everything).max()
    scale = max(abs(everything[0]), norm / 100)
    floor = rounding * norm
    values = found.eigenvalues.double().numpy()
    assert found.converged
    assert found.residuals is not None
    assert (values[:-1] >= values[1:]).all()
    product = matrix @ found.basis - found.basis * found.eigenvalues
    fresh = product.norm(dim=0)
    assert float((fresh - found.residuals * scale).abs().max()) <= floor + 1e-3 * tolerance * scale
    assert float(fresh.max()) <= tolerance * scale + floor
    identity = torch.eye(found.k, dtype=matrix.dtype)
    assert torch.allclose(found.basis.T @ found.basis, identity, atol=100 * rounding)
    # Kahan: with orthonormal vectors, eigenvalues pair off within the norm of all residuals
    # together; with one vector, an eigenvalue lies within its residual (Parlett 1998, section 4.5).
    nearest = np.abs(everything - values[:, None]).min(1)
    assert (nearest <= fresh.double().numpy() + floor).all()
    expected = wanted(everything[first : first + found.k], which)
    got = np.sort(wanted(values, which))[::-1]
    assert np.abs(got - expected).max() <= float(product.norm()) + floor


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Which, tuple[int, int], int | None, int]:
    """A symmetric matrix, which eigenvalues, their positions, the width of the start, a seed."""
    size = draw(st.integers(1, 50))
    seed = draw(st.integers(0, 10**6))
    if draw(st.booleans()):
        # Whole numbers repeat, up to 50 times, and are zero, and come with both signs.
        values = draw(st.lists(st.integers(-4, 4), min_size=size, max_size=size))
        matrix = with_spectrum(values, seed)
    else:
        normal = torch.from_numpy(np.random.default_rng(seed).standard_normal((size, size)))
        matrix = normal + normal.T
    first = draw(st.integers(0, min(size - 1, 5)))
    last = draw(st.integers(first + 1, min(size, first + 10)))
    which = draw(st.sampled_from(WHICH))
    return matrix, which, (first, last), draw(st.sampled_from([None, 1, 3])), seed


@settings(max_examples=25, deadline=None)
@given(problems())
def test_any_eigenpairs_agree_with_scipy_within_the_bound_of_their_residuals(
    problem: tuple[Tensor, Which, tuple[int, int], int | None, int],
) -> None:
    matrix, which, band, width, seed = problem
    generator = torch.Generator().manual_seed(seed + 1)
    start = None
    if width is not None:
        start = torch.randn(len(matrix), width, generator=generator, dtype=torch.float64)
    # Nine different whole numbers: so many products leave a missing copy no place to hide. With the
    # usual number one in some 2,000 of these matrices loses one.
    options: dict[str, Any] = {"tolerance": 1e-8, "max_matvecs": 3000, "check_repeated": 10}
    found = solve(matrix, which=which, band=band, start=start, seed=seed, **options)
    assert found.k == band[1] - band[0]
    check(matrix, found, 1e-8, which=which, first=band[0])


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
@pytest.mark.parametrize("k", few(1, [3, 1, 5]))
@pytest.mark.parametrize("which", WHICH)
def test_difficult_spectra_agree_with_scipy(name: str, k: int, which: Which) -> None:
    matrix = with_spectrum(SPECTRA[name], seed=k)
    if which == "smallest":
        matrix = -matrix
    found = solve(matrix, k, which=which, tolerance=1e-7, max_matvecs=3000, seed=k)
    check(matrix, found, 1e-7, which=which)


@pytest.mark.parametrize("which", WHICH)
def test_a_matrix_too_large_for_a_complete_basis_agrees_with_arpack(which: Which) -> None:
    matrix = with_spectrum(np.linspace(-1, 1.1, 400) ** 3)
    code = {"largest": "LA", "smallest": "SA", "magnitude": "LM"}[which]
    arpack = scipy.sparse.linalg.eigsh(matrix.numpy(), 6, which=code, return_eigenvectors=False)
    found = solve(matrix, 6, which=which, tolerance=1e-7, max_matvecs=2000)
    assert np.allclose(found.eigenvalues.numpy(), np.sort(arpack)[::-1], atol=1e-9)
    check(matrix, found, 1e-7, which=which)


def test_a_band_holds_the_eigenvalues_of_its_positions() -> None:
    matrix = with_spectrum(np.linspace(10, -5, 60))
    whole = solve(matrix, 7, tolerance=1e-9, max_matvecs=1000)
    band = solve(matrix, band=(4, 7), tolerance=1e-9, max_matvecs=1000)
    assert torch.equal(band.eigenvalues, whole.eigenvalues[4:])
    check(matrix, band, 1e-9, first=4)
    low = solve(matrix, band=(1, 3), which="smallest", tolerance=1e-9, max_matvecs=1000)
    spacing = 15 / 59
    assert np.allclose(low.eigenvalues.numpy(), [-5 + 2 * spacing, -5 + spacing])


def test_the_usual_case_has_a_name_of_its_own() -> None:
    matrix = with_spectrum([3.0, 2, *np.linspace(-9, 1, 58)])
    options: dict[str, Any] = {"tolerance": 1e-6, "seed": 3, "check_repeated": 2}
    named = top_eigenpairs(DenseOperator(matrix), 2, **options)
    assert torch.equal(named.basis, solve(matrix, 2, **options).basis)


@pytest.mark.parametrize("copies", [2, 3, 4])
def test_a_start_block_as_wide_as_the_multiplicity_needs_no_check(copies: int) -> None:
    matrix = with_spectrum([*np.full(copies, 5.0), 3, 2, *np.linspace(-1, 1, 94)])
    start = torch.randn(len(matrix), copies, generator=torch.Generator().manual_seed(0)).double()
    found = solve(matrix, copies + 1, tolerance=1e-7, start=start, check_repeated=0)
    check(matrix, found, 1e-7)


def test_the_check_finds_the_copies_that_one_start_vector_cannot_see() -> None:
    matrix = torch.diag(torch.tensor([5.0, 5, 5, 5, 3, *np.linspace(-1, 1, 95)]).double())
    blind = solve(matrix, 2, check_repeated=0)
    assert blind.eigenvalues.tolist() == pytest.approx([5, 3], abs=1e-3)
    check(matrix, solve(matrix, 5), 1e-3)


def test_a_zero_matrix_has_zero_eigenvalues() -> None:
    for which in WHICH:
        found = solve(torch.zeros(50, 50, dtype=torch.float64), 3, which=which)
        assert found.converged
        assert not found.eigenvalues.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_smallest_eigenvalues_of_a_semidefinite_matrix_are_zero(dtype: torch.dtype) -> None:
    matrix = with_spectrum([*np.linspace(1, 4, 20), *np.zeros(180)]).to(dtype)
    found = solve(matrix, 4, which="smallest")
    rounding = 1e-12 if dtype == torch.float64 else 3e-6
    check(matrix, found, 1e-3, which="smallest", rounding=rounding)


def test_a_top_eigenvalue_of_zero_above_negative_ones_converges() -> None:
    # The residual relative to lambda_1 = 0 has no meaning; rounding is relative to the norm.
    for dtype in (torch.float64, torch.float32):
        matrix = with_spectrum([0.0, -1, -1.5, *np.linspace(-2, -3, 97)]).to(dtype)
        found = solve(matrix, 2, max_matvecs=2000)
        assert found.converged
        assert abs(float(found.eigenvalues[0])) < 1e-3


@pytest.mark.parametrize("size", [1, 2, 3, 7, 30])
@pytest.mark.parametrize("which", WHICH)
def test_one_or_all_eigenpairs_of_a_small_matrix_are_exact(size: int, which: Which) -> None:
    matrix = with_spectrum(np.linspace(-1, 2, size))
    for k in (1, size):
        found = solve(matrix, k, which=which, tolerance=1e-10)
        check(matrix, found, 1e-10, which=which)
        if k == size:
            assert torch.allclose(found.basis * found.eigenvalues @ found.basis.T, matrix)


@pytest.mark.parametrize("basis_size", [8, 10, 14])
def test_a_small_basis_restarts_and_still_converges(basis_size: int) -> None:
    matrix = with_spectrum([3.0, 2.5, 2, 1.7, *np.linspace(-1, 1.2, 196)])
    found = solve(matrix, 4, tolerance=1e-8, basis_size=basis_size, max_matvecs=5000)
    assert found.num_matvecs > 2 * basis_size
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
    assert warm.num_matvecs < cold.num_matvecs
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
    with pytest.warns(NotConverged, match="20 products were not enough.*max_matvecs"):
        found = top_eigenpairs(DenseOperator(matrix), 5, tolerance=1e-10, max_matvecs=20)
    assert found.converged is False
    assert found.residuals is not None
    assert found.k == 5
    fresh = (matrix @ found.basis - found.basis * found.eigenvalues).norm(dim=0)
    scale = float(found.eigenvalues[0])
    assert torch.allclose(fresh / scale, found.residuals, rtol=1e-6)


def test_a_warning_points_to_the_line_that_asked() -> None:
    operator = DenseOperator(with_spectrum(np.linspace(0, 1, 300)))
    for ask in (top_eigenpairs, eigenpairs):
        with pytest.warns(NotConverged) as caught:
            ask(operator, 5, tolerance=1e-10, max_matvecs=20)
        assert [warning.filename for warning in caught] == [__file__]


def test_a_band_has_not_converged_while_a_pair_before_it_has_not() -> None:
    # A pair before the band that is not found yet would shift all positions.
    matrix = with_spectrum([1.0, 0.999999, *np.linspace(-0.1, 0.1, 98)])
    start = matrix @ torch.ones(100, dtype=torch.float64)
    with pytest.warns(NotConverged):
        found = eigenpairs(
            DenseOperator(matrix), band=(2, 3), start=start, tolerance=1e-9, max_matvecs=8
        )
    assert found.converged is False


def test_a_tolerance_below_rounding_warns_even_in_a_complete_basis() -> None:
    matrix = with_spectrum(np.linspace(0, 1, 12)).float()
    with pytest.warns(NotConverged):
        found = top_eigenpairs(DenseOperator(matrix), 3, tolerance=1e-14)
    assert found.converged is False


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("which", WHICH)
def test_an_operator_that_is_not_symmetric_is_refused(k: int, which: Which) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(40, 40, generator=generator, dtype=torch.float64)
    with pytest.raises(InvalidInput, match="a symmetric operator"):
        solve(matrix, k, which=which)


def test_an_operator_that_changes_between_products_is_refused() -> None:
    class Noisy(DenseOperator):
        def __matmul__(self, vectors: Tensor) -> Tensor:
            generator = torch.Generator().manual_seed(self.num_matvecs)
            noise = 0.3 * torch.randn(40, 40, generator=generator, dtype=torch.float64)
            return super().__matmul__(vectors) + (noise + noise.T) @ vectors

    with pytest.raises(InvalidInput, match="the same at every product"):
        top_eigenpairs(Noisy(with_spectrum(np.linspace(0, 3, 40))), 3)


def test_nan_products_are_divergence() -> None:
    with pytest.raises(Diverged):
        solve(torch.full((5, 5), float("nan")), 2)
    with pytest.raises(Diverged):
        solve(torch.diag(torch.tensor([1.0, float("inf"), 2])), 2)


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
    check(matrix, solve(matrix, 3, tolerance=1e-4, max_matvecs=3000), 1e-4, rounding=3e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k: got 0.*from 1 to"),
        ({"k": 6}, "k: got 6.*the number of parameters, 5"),
        ({"k": 2, "tolerance": 0.0}, "tolerance: got 0.0"),
        ({"k": 2, "max_matvecs": 1}, "max_matvecs: got 1.*>= k = 2"),
        ({"k": 2, "check_repeated": -1}, "check_repeated: got -1"),
        ({"k": 2, "start": torch.ones(4)}, r"start: got \(4,\)"),
        ({"k": 2, "start": torch.ones(5, 0)}, r"start: got \(5, 0\)"),
        ({"k": 2, "start": torch.ones(5, 1, 1)}, r"start: got \(5, 1, 1\)"),
        ({"k": 2, "start": torch.full((5,), torch.nan)}, "start: got 'NaN or infinite values'"),
        ({"k": 2, "start": torch.ones(5, device="meta")}, "start: got 'a tensor on meta'.* cpu"),
        ({}, "k: got None.*or give a band"),
        ({"k": 2, "band": (0, 2)}, r"k: got 2.*beside the band \(0, 2\)"),
        ({"k": 2, "which": "larges"}, "which: got 'larges'.*did you mean 'largest'"),
        ({"k": 2.5}, "k: got 2.5"),
        ({"band": (2, 2)}, r"band: got \(2, 2\)"),
        ({"band": (-1, 2)}, r"band: got \(-1, 2\)"),
        ({"band": (3, 6)}, r"band: got \(3, 6\).*<= 5, the number of parameters"),
        ({"band": (0, 3), "max_matvecs": 2}, "max_matvecs: got 2.*>= k = 3"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        eigenpairs(DenseOperator(torch.eye(5)), **options)


def test_an_operator_that_is_not_square_is_refused() -> None:
    class Oblong(DenseOperator):
        shape = (5, 4)  # type: ignore[assignment]

    with pytest.raises(InvalidInput, match=r"operator: got 'shape \(5, 4\)'.*square"):
        eigenpairs(Oblong(torch.eye(5)), 2)


def test_products_are_counted() -> None:
    operator = DenseOperator(with_spectrum([3.0, 2, *np.linspace(-1, 1, 98)]))
    assert top_eigenpairs(operator, 2).num_matvecs == operator.num_matvecs


def test_the_hessian_of_a_network_agrees_with_scipy() -> None:
    case = mlp().to(torch.float64)
    loss = Objective(case.model, case.loss, case.data, chunk_size=4)
    matrix = Hessian(loss) @ torch.eye(loss.num_parameters, dtype=torch.float64)
    found = top_eigenpairs(Hessian(loss, keep_graph=True), 4, tolerance=1e-9, max_matvecs=500)
    check((matrix + matrix.T) / 2, found, 1e-9)
