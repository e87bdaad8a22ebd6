from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests import dense
from tests.networks import CASES
from tests.sampling import few
from thalweg.errors import Diverged, InvalidInput
from thalweg.loss.objective import Objective
from thalweg.operators.hessian import Hessian
from thalweg.operators.symmetric import DenseOperator
from thalweg.spectrum import density
from thalweg.spectrum.density import Estimate, SpectralDensity, spectral_density
from thalweg.spectrum.eigensolver import top_eigenpairs
from thalweg.spectrum.probe_vectors import probe_vectors
from thalweg.spectrum.subspace import Subspace, random_subspace


def diagonal(values: Any) -> DenseOperator:
    return DenseOperator(torch.diag(torch.as_tensor(np.asarray(values, dtype=float))))


def wigner(size: int, seed: int = 0) -> Tensor:
    """A random symmetric matrix (GOE) whose spectral density tends to the semicircle on [-2, 2]."""
    normal = np.random.default_rng(seed).standard_normal((size, size))
    return torch.from_numpy((normal + normal.T) / math.sqrt(2 * size))


def semicircle(points: np.ndarray, width: float) -> np.ndarray:
    """sqrt(4 - x^2) / (2 pi), smoothed by a Gaussian."""
    x = np.linspace(-2, 2, 4001)
    law = np.sqrt(4 - x**2) / (2 * np.pi)
    return (scipy.stats.norm.pdf(points[:, None], x, width) * law).sum(1) * (x[1] - x[0])


def deviations(found: Estimate, truth: Any) -> Tensor:
    """How many standard errors lie between an estimate and the truth."""
    return (found.value - torch.as_tensor(truth)) / found.standard_error


def eigenvalues(matrix: Tensor) -> Tensor:
    return torch.from_numpy(scipy.linalg.eigh(matrix.double().numpy(), eigvals_only=True))


def test_a_wigner_matrix_has_the_semicircle() -> None:
    grid = np.linspace(-2.5, 2.5, 41)
    spectrum = spectral_density(DenseOperator(wigner(600)), probes=30, steps=40)
    found = spectrum.density(torch.from_numpy(grid), 0.15)
    law = torch.from_numpy(semicircle(grid, 0.15))
    assert float((found.value - law).abs().max()) < 0.03
    assert float(found.standard_error.max()) < 0.02
    # The law's own distance from one matrix is of order 1 / P.
    assert bool(((found.value - law).abs() <= 4 * found.standard_error + 2e-3).all())
    total = spectrum.density(torch.linspace(-4, 4, 801), 0.15).value.sum() * 0.01
    assert math.isclose(float(total), 1.0, abs_tol=1e-6)


def test_the_cumulative_share_is_the_semicircle_s() -> None:
    spectrum = spectral_density(DenseOperator(wigner(600, seed=1)), steps=40)
    law = scipy.stats.semicircular(scale=2)
    points = torch.linspace(-2.2, 2.2, 23)
    step, smooth = spectrum.cumulative(points), spectrum.cumulative(points, 0.1)
    expected = torch.from_numpy(law.cdf(points.double().numpy()))
    # A step function is off by up to half a node's weight, about 1 / steps.
    assert float((step.value - expected).abs().max()) < 0.05
    assert float((smooth.value - expected).abs().max()) < 0.02
    assert bool((step.value.diff() >= 0).all())


def test_an_outlier_stands_clear_at_its_place() -> None:
    bulk, direction = wigner(500), torch.zeros(500, dtype=torch.float64)
    direction[0] = 1
    matrix = bulk + 3 * torch.outer(direction, direction)
    spectrum = spectral_density(DenseOperator(matrix), probes=20, steps=40)
    exact = eigenvalues(matrix)
    smallest, largest = spectrum.extremes
    assert math.isclose(largest, float(exact[-1]), rel_tol=1e-10)
    # Baik, Ben Arous, Peche: strength + 1 / strength, with fluctuations of sqrt(2 / P).
    assert abs(largest - (3 + 1 / 3)) < 4 * math.sqrt(2 / 500)
    assert 0 <= smallest - float(exact[0]) < 0.05
    above = 1 - spectrum.cumulative(torch.tensor([2.5])).value
    assert abs(float(above) * 500 - 1) < 4 * math.sqrt(2 / 20)


def test_known_outliers_enter_with_their_exact_weight() -> None:
    operator = diagonal([50.0, 40, -30, *np.linspace(-1, 1, 297)])
    known = top_eigenpairs(operator, 2, tolerance=1e-10)
    spectrum = spectral_density(operator, known=known, steps=30)
    shares = 1 - spectrum.cumulative(torch.tensor([45.0, 2.0])).value
    assert torch.allclose(shares * 300, torch.tensor([1.0, 2.0], dtype=torch.float64))
    blind = spectral_density(operator, steps=30)
    truth = float(operator.matrix.square().sum()) / 300
    assert abs(float(deviations(spectrum.moment(2), truth))) < 3
    assert spectrum.moment(2).standard_error < blind.moment(2).standard_error
    assert spectrum.extremes == pytest.approx((-30, 50), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_directions_that_are_no_eigenvectors_leave_the_operator_on_their_complement(
    dtype: torch.dtype,
) -> None:
    matrix = wigner(200).to(dtype)
    basis = random_subspace(200, 3, 0, dtype=dtype).basis
    known = Subspace(basis, (basis * (matrix @ basis)).sum(0))
    spectrum = spectral_density(DenseOperator(matrix), probes=2, steps=300, known=known)
    rest = scipy.linalg.null_space(basis.T.double().numpy())
    exact = torch.from_numpy(scipy.linalg.eigvalsh(rest.T @ matrix.double().numpy() @ rest))
    assert torch.allclose(
        spectrum.nodes, exact.expand(2, -1), atol=2 * torch.finfo(dtype).eps ** 0.8
    )
    # The complement is exhausted: nothing is left out.
    assert not spectrum.residuals.any()
    assert spectrum.num_matvecs == 2 * 197


def test_the_quadrature_of_a_probe_integrates_polynomials_of_degree_below_twice_its_steps() -> None:
    matrix, steps = wigner(60), 4
    spectrum = spectral_density(DenseOperator(matrix), probes=3, steps=steps, seed=5)
    empty = torch.empty(60, 0, dtype=torch.float64)
    probes = probe_vectors(empty, 3, torch.Generator().manual_seed(5))
    for power in range(2 * steps):
        forms = (probes * (torch.linalg.matrix_power(matrix, power) @ probes)).sum(0)
        assert math.isclose(float(spectrum.moment(power).value), float(forms.mean()), rel_tol=1e-9)
    with pytest.raises(InvalidInput, match="power: got 8, allowed: an integer from 0 to 7"):
        spectrum.moment(8)


SPECTRA: dict[str, Any] = {
    "a network's": [-0.5, *np.geomspace(1e-5, 1, 190), 3, 4, 5, 6, 7, 8, 9, 10, 20],
    "indefinite": np.linspace(-3, 2, 200),
    "many zeros": [*np.zeros(150), *np.linspace(1, 2, 50)],
}


@pytest.mark.parametrize("name", few(1, SPECTRA))
def test_the_truth_lies_within_the_error_bars(name: str) -> None:
    values = np.asarray(SPECTRA[name], dtype=float)
    operator = diagonal(values)
    point = torch.tensor([0.6], dtype=torch.float64)
    below = scipy.stats.norm.cdf((0.6 - values) / 0.3).mean()
    height = scipy.stats.norm.pdf(0.6, values, 0.3).mean()
    misses = []
    for seed in range(40):
        spectrum = spectral_density(operator, steps=20, seed=seed)
        moments = [deviations(spectrum.moment(p), (values**p).mean()) for p in (1, 2, 3)]
        share = deviations(spectrum.cumulative(point, 0.3), below)
        density_there = deviations(spectrum.density(point, 0.3), height)
        misses.append(torch.stack([*moments, share[0], density_there[0]]))
    found = torch.stack(misses)
    assert bool(((found.abs() <= 3).double().mean(0) >= 0.95).all())
    assert bool((found.std(0) > 0.6).all())
    assert bool((found.std(0) < 1.2).all())
    assert bool((found.mean(0).abs() < 0.5).all())


def test_errors_fall_with_the_square_root_of_the_probes() -> None:
    operator = diagonal(np.linspace(-1, 2, 300))
    few, many = (
        float(spectral_density(operator, probes=m, steps=5).moment(2).standard_error)
        for m in (20, 320)
    )
    assert few / many == pytest.approx(4, rel=0.4)


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(1, 40),
    steps=st.integers(1, 50),
    probes=st.integers(1, 6),
    seed=st.integers(0, 10**6),
)
def test_nodes_lie_inside_the_spectrum_and_near_an_eigenvalue(
    size: int, steps: int, probes: int, seed: int
) -> None:
    matrix = wigner(size, seed)
    spectrum = spectral_density(DenseOperator(matrix), probes=probes, steps=steps, seed=seed)
    exact = eigenvalues(matrix)
    rounding = 1e-12 * float(exact.abs().max())
    assert spectrum.nodes.shape == (probes, min(size, steps))
    assert torch.allclose(spectrum.weights.sum(1), torch.ones(probes, dtype=torch.float64))
    assert bool((spectrum.weights >= 0).all())
    assert spectrum.extremes[0] >= float(exact[0]) - rounding
    assert spectrum.extremes[1] <= float(exact[-1]) + rounding
    nearest = (spectrum.nodes[..., None] - exact).abs().amin(-1)
    assert bool((nearest <= spectrum.residuals + 100 * rounding).all())
    if steps >= size:
        assert not spectrum.residuals.any()


@settings(max_examples=25, deadline=None)
@given(factor=st.floats(0.01, 100), shift=st.floats(-5, 5), seed=st.integers(0, 1000))
def test_scaling_and_shifting_the_operator_moves_the_nodes_alone(
    factor: float, shift: float, seed: int
) -> None:
    matrix = wigner(30, seed)
    moved = factor * matrix + shift * torch.eye(30, dtype=torch.float64)
    plain, other = (
        spectral_density(DenseOperator(m), probes=2, steps=6, seed=seed) for m in (matrix, moved)
    )
    extent = abs(shift) + 2 * factor
    assert torch.allclose(other.nodes, factor * plain.nodes + shift, atol=1e-9 * extent, rtol=0)
    assert torch.allclose(other.weights, plain.weights, atol=1e-8 * extent / factor)


def test_full_reorthogonalization_leaves_no_copies_of_converged_eigenvalues() -> None:
    spectrum = spectral_density(diagonal([100.0, 50, *np.geomspace(1e-6, 1, 298)]), steps=90)
    assert bool((spectrum.nodes > 10).sum(1).eq(2).all())


@pytest.mark.parametrize(
    ("values", "distinct"),
    [(np.zeros(20), 1), (np.full(20, 3.0), 1), ([2.0] * 5 + [-1.0] * 15, 2), ([7.0], 1)],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_exhausted_space_ends_the_recurrence(
    values: Any, distinct: int, dtype: torch.dtype
) -> None:
    operator = DenseOperator(diagonal(values).matrix.to(dtype))
    spectrum = spectral_density(operator, probes=4, steps=15)
    assert spectrum.nodes.shape == (4, distinct)
    assert spectrum.num_matvecs == operator.num_matvecs == 4 * distinct
    assert not spectrum.residuals.any()
    expected = torch.from_numpy(np.unique(values)).expand(4, -1)
    assert torch.allclose(spectrum.nodes, expected, atol=1e-6)
    # Nothing is left out, so every moment is exact for each probe.
    assert math.isfinite(float(spectrum.moment(50).value))


def test_probes_that_end_early_keep_their_own_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    starts = torch.tensor([[1.0, 1], [0, 1], [0, 1]], dtype=torch.float64)
    starts = starts / starts.norm(dim=0)
    monkeypatch.setattr(density, "probe_vectors", lambda *_: starts)
    spectrum = spectral_density(diagonal([3.0, 2, 1]), probes=2, steps=3)
    shares = [[0.0, 0, 0, 1], [0.0, 1 / 3, 2 / 3, 1]]
    points = torch.tensor([0.5, 1.5, 2.5, 3.5], dtype=torch.float64)
    below = (spectrum.nodes[..., None] <= points).double() * spectrum.weights[..., None]
    assert torch.allclose(below.sum(1), torch.tensor(shares, dtype=torch.float64))
    assert spectrum.extremes == pytest.approx((1, 3))


@pytest.mark.parametrize("block", [1, 3, 7, 100])
def test_running_probes_in_turns_changes_nothing_but_memory(block: int) -> None:
    operator = DenseOperator(wigner(50))
    together, in_turns = (
        spectral_density(operator, probes=7, steps=10, block=b) for b in (None, block)
    )
    assert torch.allclose(together.nodes, in_turns.nodes, atol=1e-10)
    assert torch.allclose(together.weights, in_turns.weights, atol=1e-9)
    assert together.num_matvecs == in_turns.num_matvecs == 70


def test_a_step_is_one_product_with_a_block() -> None:
    widths: list[int] = []

    class Watched(DenseOperator):
        def __matmul__(self, vectors: Tensor) -> Tensor:
            widths.append(vectors.shape[1])
            return super().__matmul__(vectors)

    operator = Watched(wigner(50))
    spectrum = spectral_density(operator, probes=7, steps=12, block=5)
    assert widths == [5] * 12 + [2] * 12
    assert spectrum.num_matvecs == operator.num_matvecs == 84


def test_float32_agrees_with_float64() -> None:
    matrix = wigner(200) + 5 * torch.eye(200, dtype=torch.float64)
    wide, narrow = (spectral_density(DenseOperator(m), steps=20) for m in (matrix, matrix.float()))
    assert narrow.nodes.dtype == torch.float64
    assert narrow.extremes == pytest.approx(wide.extremes, rel=1e-5)
    grid = torch.linspace(2, 8, 31)
    difference = narrow.density(grid, 0.2).value - wide.density(grid, 0.2).value
    assert float(difference.abs().max()) < 1e-4


@pytest.mark.gpu
def test_a_gpu_gives_the_same_quadrature() -> None:
    matrix = wigner(200)
    known = top_eigenpairs(DenseOperator(matrix), 2, tolerance=1e-9)
    here, there = (
        spectral_density(DenseOperator(matrix.to(device)), steps=20, known=known)
        for device in ("cpu", "cuda")
    )
    assert torch.allclose(here.nodes, there.nodes, atol=1e-9)
    assert torch.allclose(here.weights, there.weights, atol=1e-8)
    assert float(here.moment(1).value) == pytest.approx(float(there.moment(1).value))


def test_the_same_seed_gives_the_same_bits_and_the_global_random_state_is_left_alone() -> None:
    operator, before = DenseOperator(wigner(40).float()), torch.get_rng_state()
    first, again, other = (spectral_density(operator, steps=8, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.nodes, again.nodes)
    assert torch.equal(first.weights, again.weights)
    assert not torch.equal(first.nodes, other.nodes)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("probes", [1, 5])
def test_the_error_is_that_of_the_closed_form_on_the_sphere(probes: int) -> None:
    values = np.linspace(-1, 3, 1000)
    spectrum = spectral_density(diagonal(values), probes=probes, steps=10)
    # Var[v^T A v] = 2 / (P + 2) times the variance of the eigenvalues.
    expected = math.sqrt(2 / 1002 * values.var() / probes)
    assert float(spectrum.moment(1).standard_error) >= 0.95 * expected
    if probes == 1:
        assert float(spectrum.moment(1).standard_error) <= 1.05 * expected


def test_an_operator_that_is_not_symmetric_is_refused() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(40, 40, generator=generator)
    with pytest.raises(InvalidInput, match=r"operator: .*a symmetric operator"):
        spectral_density(DenseOperator(matrix), steps=5)


def test_nan_products_are_divergence() -> None:
    for value in (float("nan"), float("inf")):
        with pytest.raises(Diverged, match="a product with the operator"):
            spectral_density(DenseOperator(torch.full((5, 5), value)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probes": 0}, "probes: got 0, allowed: an integer >= 1"),
        ({"steps": 0}, "steps: got 0"),
        ({"block": 0}, "block: got 0"),
        ({"known": random_subspace(6, 2, 0)}, "known: got Subspace.*dimension < P = 5"),
        ({"known": Subspace(torch.eye(5), torch.ones(5))}, "dimension < P = 5"),
        ({"known": random_subspace(5, 2, 0)}, "finite eigenvalues; take those of"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        spectral_density(DenseOperator(torch.eye(5)), **options)


def test_impossible_questions_are_refused() -> None:
    spectrum = spectral_density(DenseOperator(wigner(20)), steps=3)
    with pytest.raises(InvalidInput, match=r"width: got 0\.0"):
        spectrum.density(torch.zeros(1), 0.0)
    with pytest.raises(InvalidInput, match="width: got -1"):
        spectrum.cumulative(torch.zeros(1), -1)
    with pytest.raises(InvalidInput, match=r"points: got \(\)"):
        spectrum.cumulative(torch.tensor(0.0))
    with pytest.raises(InvalidInput, match=r"grid: got \(2, 2\)"):
        spectrum.density(torch.zeros(2, 2), 0.1)
    for power in (-1, 0.5):
        with pytest.raises(InvalidInput, match=f"power: got {power}, allowed: an integer"):
            spectrum.moment(power)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["mlp", "silu"])
def test_the_hessian_of_a_network_has_the_density_of_the_dense_one(name: str) -> None:
    case = CASES[name]().to(torch.float64)
    matrix = dense.hessian(dense.flat_loss(case), dense.flat_parameters(case))
    exact = eigenvalues(matrix)
    hessian = Hessian(Objective(case.model, case.loss, case.data), keep_graph=True)
    spectrum: SpectralDensity = spectral_density(hessian, probes=20, steps=30)
    assert spectrum.num_matvecs == hessian.num_matvecs == 600
    assert spectrum.extremes[1] == pytest.approx(float(exact[-1]), rel=1e-6)
    for power in (1, 2, 3):
        assert abs(float(deviations(spectrum.moment(power), (exact**power).mean()))) < 3.5
    grid = torch.linspace(float(exact[0]), float(exact[-1]), 9, dtype=torch.float64)
    width = float(exact[-1] - exact[0]) / 20
    truth = torch.from_numpy(scipy.stats.norm.cdf((grid[:, None] - exact).numpy() / width).mean(1))
    assert bool((deviations(spectrum.cumulative(grid, width), truth).abs() < 3.5).all())
