from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import dense
from tests.networks import CASES
from tests.sampling import few
from thalweg.errors import Diverged, InvalidInput
from thalweg.loss.objective import Objective
from thalweg.operators.hessian import Hessian
from thalweg.operators.symmetric import DenseOperator
from thalweg.spectrum.eigensolver import top_eigenpairs
from thalweg.spectrum.subspace import Subspace, random_subspace
from thalweg.spectrum.trace_estimation import trace


def symmetric(size: int, seed: int = 0) -> torch.Tensor:
    normal = np.random.default_rng(seed).standard_normal((size, size))
    return torch.from_numpy(normal + normal.T)


def diagonal(values: Any) -> DenseOperator:
    return DenseOperator(torch.diag(torch.as_tensor(np.asarray(values, dtype=float))))


def ritz(matrix: torch.Tensor, k: int, seed: int) -> Subspace:
    """Random directions with their Rayleigh quotients: known, but far from eigenvectors."""
    # One direction at least is drawn; of k = 0 nothing is known.
    basis = random_subspace(len(matrix), max(k, 1), seed, dtype=matrix.dtype).basis[:, :k]
    return Subspace(basis, (basis * (matrix @ basis)).sum(0))


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 30),
    k=st.integers(0, 6),
    products=st.integers(4, 40),
    seed=st.integers(0, 10**6),
)
def test_the_budget_is_kept_and_enough_of_it_gives_the_exact_trace(
    size: int, k: int, products: int, seed: int
) -> None:
    matrix, k = symmetric(size, seed), min(k, size - 1)
    operator = DenseOperator(matrix)
    found = trace(operator, num_matvecs=products, seed=seed, known=ritz(matrix, k, seed))
    assert found.num_matvecs == operator.num_matvecs == min(products, size - k)
    if products >= size - k:
        assert found.standard_error == 0
        assert math.isclose(found.value, float(matrix.trace()), abs_tol=1e-11 * size)
    else:
        assert found.standard_error > 0


def test_a_large_block_is_multiplied_in_parts() -> None:
    matrix = symmetric(150)
    assert math.isclose(trace(DenseOperator(matrix), num_matvecs=150).value, float(matrix.trace()))


SPECTRA: dict[str, Any] = {
    "a network's": [-0.5, *np.geomspace(1e-5, 1, 290), 3, 4, 5, 6, 7, 8, 9, 10, 20],
    "of trace zero": np.linspace(-1, 1, 300),
    "negative definite": -np.geomspace(1e-3, 1, 300),
    "large of both signs": [50.0, -49, 48, -47, *np.linspace(-1, 1.5, 296)],
}


@pytest.mark.parametrize("name", few(2, SPECTRA))
@pytest.mark.parametrize("k", few(1, [3, 0]))
def test_the_truth_lies_within_the_error_bars(name: str, k: int) -> None:
    operator = diagonal(SPECTRA[name])
    known = ritz(operator.matrix, k, 1)
    truth = float(operator.matrix.trace())
    found = [trace(operator, num_matvecs=60, seed=seed, known=known) for seed in range(100)]
    misses = np.array([(each.value - truth) / each.standard_error for each in found])
    assert (np.abs(misses) <= 3).mean() >= 0.98
    assert 0.8 < misses.std() < 1.2
    assert abs(misses.mean()) < 4 / math.sqrt(100)


def test_a_decaying_spectrum_needs_far_fewer_products_than_probes_alone() -> None:
    values = np.arange(1.0, 401) ** -1.5
    found = [trace(diagonal(values), num_matvecs=60, seed=seed) for seed in range(20)]
    error = math.sqrt(np.mean([(each.value - values.sum()) ** 2 for each in found]))
    # Hutchinson's variance with Gaussian probes: 2 norm(A)^2 / products.
    assert error < 0.1 * math.sqrt(2 * (values**2).sum() / 60)


def test_the_error_is_that_of_the_closed_form_for_probes_on_the_sphere() -> None:
    # A sketch of a flat spectrum removes nothing: Var[P v^T A v] = 2 P sum(lambda^2) / (P + 2)
    # where the trace is zero.
    values = np.tile([1.0, -1.0], 1000)
    errors = [trace(diagonal(values), num_matvecs=30, seed=s).standard_error for s in range(20)]
    expected = math.sqrt(2 * 2000 * 2000 / 2002 / 10)
    assert math.sqrt(np.mean(np.square(errors))) == pytest.approx(expected, rel=0.15)


def test_what_the_sketch_spans_is_summed_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(200, 5, generator=generator, dtype=torch.float64)
    signs = torch.tensor([1.0, -1, 1, -1, 1], dtype=torch.float64)
    matrix = factor * signs @ factor.T
    found = trace(DenseOperator(matrix), num_matvecs=18)
    assert math.isclose(found.value, float(matrix.trace()), rel_tol=1e-10)
    assert found.standard_error < 1e-10 * abs(found.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_multiple_of_the_identity_has_no_variance(dtype: torch.dtype) -> None:
    found = trace(DenseOperator(3 * torch.eye(500, dtype=dtype)), num_matvecs=10)
    assert math.isclose(found.value, 1500, rel_tol=1e-5)
    assert found.standard_error < 1e-3
    zero = trace(DenseOperator(torch.zeros(50, 50, dtype=dtype)), num_matvecs=10)
    assert (zero.value, zero.standard_error) == (0, 0)


def test_known_eigenpairs_lower_the_error_at_no_product() -> None:
    operator = diagonal([90.0, 80, 70, 60, 50, *np.linspace(-1, 1, 295)])
    known = top_eigenpairs(operator, 5)
    blind, informed = (trace(operator, num_matvecs=9, known=space) for space in (None, known))
    assert informed.num_matvecs == blind.num_matvecs == 9
    assert informed.standard_error < blind.standard_error / 5
    assert abs(informed.value - 350) < 4 * informed.standard_error


def test_a_sketch_that_adds_nothing_to_what_is_known_does_no_harm() -> None:
    operator = diagonal([5.0, 4, 3, *np.zeros(97)])
    known = Subspace(torch.eye(100, dtype=torch.float64)[:, :3], torch.tensor([5.0, 4, 3]))
    found = trace(operator, num_matvecs=30, known=known)
    assert math.isclose(found.value, 12, rel_tol=1e-12)
    assert found.standard_error < 1e-12


def test_float32_agrees_with_float64() -> None:
    matrix = symmetric(100)
    wide, narrow = (trace(DenseOperator(m), num_matvecs=30) for m in (matrix, matrix.float()))
    assert narrow.value == pytest.approx(wide.value, abs=1e-2)
    assert narrow.standard_error == pytest.approx(wide.standard_error, rel=1e-3)


@pytest.mark.gpu
def test_a_gpu_gives_the_same_estimate() -> None:
    matrix = symmetric(100)
    for products in (30, 100):
        here, there = (
            trace(DenseOperator(matrix.to(device)), num_matvecs=products, known=ritz(matrix, 2, 0))
            for device in ("cpu", "cuda")
        )
        assert there.value == pytest.approx(here.value, rel=1e-9)
        assert there.standard_error == pytest.approx(here.standard_error, rel=1e-6)


def test_the_same_seed_gives_the_same_bits_and_the_global_random_state_is_left_alone() -> None:
    operator, before = DenseOperator(symmetric(40).float()), torch.get_rng_state()
    first, again, other = (trace(operator, num_matvecs=12, seed=seed) for seed in (3, 3, 4))
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), before)


def test_nan_products_are_divergence() -> None:
    for size in (5, 200):
        for value in (float("nan"), float("inf")):
            with pytest.raises(Diverged):
                trace(DenseOperator(torch.full((size, size), value)))


@pytest.mark.parametrize("products", [-1, 0, 3])
def test_too_few_products_are_refused(products: int) -> None:
    with pytest.raises(
        InvalidInput, match=f"num_matvecs: got {products}, allowed: an integer >= 4"
    ):
        trace(DenseOperator(torch.eye(5)), num_matvecs=products)


def test_a_known_subspace_of_another_space_is_refused() -> None:
    with pytest.raises(InvalidInput, match="known: got Subspace"):
        trace(DenseOperator(torch.eye(5)), known=random_subspace(6, 2, 0))


@pytest.mark.parametrize("name", ["mlp", "silu", "cnn"])
def test_the_hessian_of_a_network_has_the_trace_of_the_dense_one(name: str) -> None:
    case = CASES[name]().to(torch.float64)
    matrix = dense.hessian(dense.flat_loss(case), dense.flat_parameters(case))
    truth = float(matrix.trace())
    hessian = Hessian(Objective(case.model, case.loss, case.data), keep_graph=True)
    found = trace(hessian, num_matvecs=30)
    assert abs(found.value - truth) < 3 * found.standard_error
    assert found.standard_error < 0.3 * float(matrix.diagonal().abs().sum())
    exact = trace(hessian, num_matvecs=len(matrix))
    assert math.isclose(exact.value, truth, rel_tol=1e-9)
    assert hessian.num_matvecs == 30 + len(matrix)
