"""Differences of gradients are within their own error estimate, along any direction."""

from __future__ import annotations

import copy
import functools
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests import dense
from tests.networks import Case, attention, digits, mlp, silu
from tests.sampling import few
from thalweg.errors import Diverged, InvalidInput
from thalweg.loss.function_loss import FunctionLoss
from thalweg.loss.gradient_differences import DifferenceSteps, GradientDifferences
from thalweg.loss.lockstep_objective import LockstepObjective
from thalweg.loss.objective import Objective
from thalweg.operators import Hessian, Preconditioned
from thalweg.operators.restricted import Restricted
from thalweg.operators.symmetric import DenseOperator
from thalweg.spectrum.eigensolver import NotConverged, top_eigenpairs
from thalweg.spectrum.threshold_split import split_at
from thalweg.tracking.tracker import SubspaceTracker


def transformer() -> Case:
    """A GELU transformer of torch, after some steps of Adam: a few sharp directions."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        8, 2, 16, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    model = nn.Sequential(nn.Embedding(9, 8), layer, nn.Flatten(), nn.Linear(40, 9))
    tokens = torch.randint(0, 9, (24, 5))
    return trained(Case(model, nn.CrossEntropyLoss(), (tokens, (3 * tokens[:, 0] + 1) % 9)))


def convolutions() -> Case:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.GELU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 3)
    )
    return Case(model, nn.CrossEntropyLoss(), (torch.randn(9, 1, 6, 6), torch.randint(0, 3, (9,))))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.LSTM(3, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.layer(inputs)[0][:, -1])


def recurrent() -> Case:
    torch.manual_seed(2)
    return Case(Recurrent(), nn.MSELoss(), (torch.randn(10, 4, 3), torch.randn(10, 2)))


def few_digits() -> Case:
    """The network of digits on 400 samples: its Hessian in full takes a second less."""
    case = digits(50)
    return Case(case.model, case.loss, (case.data[0][:400], case.data[1][:400]))


def trained(case: Case, steps: int = 60) -> Case:
    optimizer = torch.optim.Adam(case.model.parameters(), 5e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        case.loss(case.model(case.data[0]), case.data[1]).backward()
        optimizer.step()
    return case


CASES: dict[str, Callable[[], Case]] = {
    "mlp": mlp,
    "attention": attention,
    "transformer": transformer,
    "convolutions": convolutions,
    "recurrent": recurrent,
    "silu": silu,
    "digits": few_digits,
}


@functools.cache
def in_full(name: str) -> Tensor:
    """The Hessian of a case in float64, (P, P)."""
    case = copy.deepcopy(CASES[name]()).to(torch.float64)
    return dense.hessian(dense.flat_loss(case), dense.flat_parameters(case))


PRECISIONS = {
    "float64": (torch.float64, None),
    "float32": (torch.float32, None),
    "bfloat16": (torch.float32, torch.bfloat16),
}


def by_differences(case: Case, precision: str, **options: Any) -> Objective:
    dtype, forward_dtype = PRECISIONS[precision]
    case = copy.deepcopy(case).to(dtype)
    return Objective(
        case.model,
        case.loss,
        case.data,
        forward_dtype=forward_dtype,
        product="difference",
        vectorize_up_to=0,
        **options,
    )


def directions(matrix: Tensor, gradient: Tensor) -> Tensor:
    """Sharp, flat and random vectors, a coordinate, the gradient, a long one; rows (n, P)."""
    _, vectors = torch.linalg.eigh(matrix)
    size = len(matrix)
    flat = vectors[:, matrix.shape[0] // 2]
    chance = torch.randn(size, 2, generator=torch.Generator().manual_seed(1), dtype=matrix.dtype)
    coordinate = torch.eye(size, dtype=matrix.dtype)[3]
    sharp = vectors[:, [-1, -2, -3, 0]]
    return torch.cat(
        [
            chance.T,
            sharp.T,
            torch.stack([coordinate, gradient / gradient.norm(), 100 * sharp[:, 0], flat]),
        ]
    )


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize(("name", "precision"), few(4, [(n, p) for n in CASES for p in PRECISIONS]))
def test_products_are_within_their_own_error(name: str, precision: str, measured: bool) -> None:
    case = CASES[name]()
    double = copy.deepcopy(case).to(torch.float64)
    loss, theta = dense.flat_loss(double), dense.flat_parameters(double)
    matrix = in_full(name)
    vectors = directions(matrix, dense.gradient(loss, theta))
    objective = by_differences(case, precision)
    dtype = objective.dtype
    at = objective.linearize(theta.to(dtype))
    assert isinstance(at, GradientDifferences)
    expected = vectors @ matrix
    lead = float(torch.linalg.eigvalsh(matrix)[-1])
    stated = []
    for vector, exact in zip(vectors, expected, strict=True):
        images, errors = at.multiply_with_error(vector.to(dtype)[None], measured=measured)
        assert float((images[0].double() - exact).norm()) <= float(errors[0])
        stated.append(float(errors[0]) / lead / float(vector.norm()))
    # An estimate that is always large would be no estimate.
    assert (
        sorted(stated)[len(stated) // 2]
        < {"float64": 1e-8, "float32": 2e-3, "bfloat16": 0.5}[precision]
    )
    images, errors = at.multiply_with_error(vectors.to(dtype), measured=measured)
    assert bool(((images.double() - expected).norm(dim=1) <= errors).all())


def test_rounding_decides_along_flat_directions_and_third_derivatives_along_sharp_ones() -> None:
    case, matrix = few_digits().to(torch.float64), in_full("digits")
    values, vectors = torch.linalg.eigh(matrix)
    steps = DifferenceSteps(torch.finfo(torch.float64).eps)
    objective = Objective(case.model, case.loss, case.data)
    at = GradientDifferences(objective.gradient, objective.theta(), steps)
    at.multiply(vectors[:, :1].T.contiguous())
    slopes = values[[-1, -30]].abs().tolist()
    assert steps.step(slopes[0]) < steps.step(slopes[1])


def test_dropout_is_the_same_in_both_gradients() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 30), nn.Tanh(), nn.Dropout(0.5), nn.Linear(30, 3)).double()
    data = (torch.randn(20, 4).double(), torch.randint(0, 3, (20,)))
    options: dict[str, Any] = {"mode": "train", "seed": 3, "chunk_size": 7}
    exact, other = (
        Objective(model, nn.CrossEntropyLoss(), [data], product=product, **options)
        for product in ("exact", "difference")
    )
    vector = torch.randn(exact.num_parameters).double()
    image, errors = Hessian(other).product_with_error(vector)
    assert errors is not None
    assert float((image - Hessian(exact) @ vector).norm()) <= float(errors)
    assert dense.relative(image, Hessian(exact) @ vector) < 1e-7


def test_nothing_of_the_user_moves() -> None:
    case = digits(10)
    objective = by_differences(case, "float32")
    model = objective.model
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = objective.theta()
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
    _ = Hessian(objective) @ torch.ones(objective.num_parameters, 2)
    assert torch.equal(objective.theta(), before)
    assert all(bool((p.grad == 1).all()) for p in model.parameters())  # type: ignore[union-attr]
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]  # type: ignore[index]
    assert random.getstate() == states[2]


def test_a_product_takes_two_gradients_once_steps_are_known() -> None:
    objective = by_differences(digits(50), "float32")
    hessian = Hessian(objective)
    vector = torch.randn(objective.num_parameters, generator=torch.Generator().manual_seed(0))
    calls = 0
    evaluate = objective.value_and_gradient

    def counted(*args: Any) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        return evaluate(*args)

    objective.value_and_gradient = counted  # type: ignore[method-assign]
    _ = hessian @ vector
    assert 12 <= calls <= 30
    calls = 0
    _ = hessian @ vector
    assert calls == 2
    _ = hessian.product_with_error(vector, measured=True)
    assert calls == 6


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_steps_fit_functions_of_any_scale(scale: float) -> None:
    theta = scale * torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    loss = FunctionLoss(lambda t: (t / scale).pow(4).sum(), theta, product="difference")
    image, errors = Hessian(loss).product_with_error(torch.eye(3, dtype=torch.float64))
    exact = torch.diag(12 * (theta / scale) ** 2 / scale**2)
    assert errors is not None
    assert bool(((image - exact).norm(dim=0) <= errors).all())
    assert dense.relative(image, exact) < 1e-7


def test_a_loss_without_curvature_has_zero_products() -> None:
    theta = torch.tensor([1.0, 2.0])
    loss = FunctionLoss(lambda t: 3 * t.sum(), theta, product="difference")
    image, errors = Hessian(loss).product_with_error(torch.eye(2))
    assert errors is not None
    assert bool((image.norm(dim=0) <= errors).all())
    assert bool((errors < 1e-3).all())


def test_zero_vectors_give_zero_without_error() -> None:
    objective = by_differences(mlp(), "float64")
    block = torch.zeros(objective.num_parameters, 3, dtype=torch.float64)
    block[:, 1] = 1
    image, errors = Hessian(objective).product_with_error(block)
    assert errors is not None
    assert bool((image[:, [0, 2]] == 0).all())
    assert errors[[0, 2]].tolist() == [0.0, 0.0]


def test_a_loss_that_is_infinite_nearby_is_told() -> None:
    theta = torch.tensor([1e-30, 1.0], dtype=torch.float64)
    loss = FunctionLoss(lambda t: t.log().sum(), theta, product="difference")
    with pytest.raises(Diverged):
        _ = Hessian(loss) @ torch.eye(2, dtype=torch.float64)


def test_wrapped_operators_pass_errors_on() -> None:
    matrix, objective = in_full("digits"), by_differences(few_digits(), "float32")
    size = objective.num_parameters
    diagonal = torch.rand(size, generator=torch.Generator().manual_seed(0)) + 0.1
    vectors = torch.randn(size, 3, generator=torch.Generator().manual_seed(1))
    root = diagonal.double().rsqrt()
    image, errors = Preconditioned(Hessian(objective), diagonal).product_with_error(vectors)
    exact = root[:, None] * (matrix @ (root[:, None] * vectors.double()))
    assert errors is not None
    assert bool(((image.double() - exact).norm(dim=0) <= errors).all())
    chosen = torch.arange(0, size, 3)
    image, errors = Restricted(Hessian(objective), chosen).product_with_error(vectors[chosen])
    exact = matrix[chosen][:, chosen] @ vectors[chosen].double()
    assert errors is not None
    assert bool(((image.double() - exact).norm(dim=0) <= errors).all())


@pytest.mark.parametrize(
    ("name", "precision", "tolerance"),
    few(
        3,
        [
            ("mlp", "float64", 1e-6),
            ("transformer", "float32", 1e-3),
            ("digits", "float32", 1e-6),
            ("digits", "bfloat16", 1e-2),
            ("attention", "bfloat16", 1e-2),
            ("recurrent", "float32", 1e-3),
            ("convolutions", "bfloat16", 0.1),
            ("silu", "float32", 1e-5),
            ("transformer", "bfloat16", 0.1),
        ],
    ),
)
def test_residuals_include_the_products_errors(name: str, precision: str, tolerance: float) -> None:
    case, matrix = CASES[name](), in_full(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotConverged)
        found = top_eigenpairs(by_differences(case, precision), 3, tolerance=tolerance)
    basis, values = found.basis.double(), found.eigenvalues.double()
    lead = torch.linalg.eigvalsh(matrix).flip(0)[:3]
    true = (matrix @ basis - basis * values).norm(dim=0) / values[0]
    assert found.residuals is not None
    assert found.eigenvalue_errors is not None
    assert bool((true <= 1.5 * found.residuals + 1e-9).all())
    assert bool(((values - lead).abs() <= 1.5 * found.eigenvalue_errors + 1e-9 * lead[0]).all())
    assert found.converged == bool((found.residuals <= tolerance).all())
    # It ends where its products say no more.
    assert found.num_matvecs < 60


def test_a_solve_that_its_products_cannot_give_says_so() -> None:
    objective = by_differences(digits(50), "float32")
    with pytest.warns(NotConverged, match="its products are off by.*raise the tolerance"):
        top_eigenpairs(objective, 2, tolerance=1e-7)


@pytest.mark.filterwarnings("ignore::thalweg.spectrum.eigensolver.NotConverged")
@pytest.mark.parametrize("precision", few(1, ["float32", "bfloat16", "float64"]))
def test_a_tracked_projection_is_within_its_error_with_the_products_own(precision: str) -> None:
    case = few_digits()
    objective = by_differences(case, precision)
    tracker = SubspaceTracker(objective, 2, error=0.02, seed=1)
    double = copy.deepcopy(case).to(torch.float64)
    for _ in range(3):
        objective.write(objective.theta() - 0.1 * objective.gradient())
        gradient, theta = objective.gradient(), objective.theta().double()
        found = tracker.update(vector=gradient)
        matrix = dense.hessian(dense.flat_loss(double), theta)
        values, vectors = torch.linalg.eigh(matrix)
        basis = vectors[:, -2:]
        exact = basis @ (basis.T @ gradient.double())
        apart = float((found.project(gradient).double() - exact).norm() / gradient.norm())
        # An estimate of a random variable, as for exact products.
        assert apart <= 3 * tracker.report.error + 1e-3
        assert (tracker._product_error > 0.01) == (precision == "bfloat16")
        uncertain = torch.tensor(tracker.report.eigenvalue_errors).double()
        off = (found.eigenvalues.double() - values.flip(0)[:2]).abs()
        assert bool((off <= 3 * uncertain + 1e-3 * float(found.eigenvalues[0])).all())


@pytest.mark.parametrize("precision", few(1, ["float32", "bfloat16"]))
def test_splits_at_a_threshold_include_the_products_errors(precision: str) -> None:
    matrix, objective = in_full("digits"), by_differences(few_digits(), precision)
    vector = objective.gradient()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotConverged)
        split = split_at(objective, vector, 0.5, error=0.005)
        exact = split_at(DenseOperator(matrix), vector.double(), split.threshold, error=1e-4)
    apart = float((split.above.double() - exact.above).norm() / vector.norm())
    assert apart <= 1.5 * split.error + exact.error


def test_runs_in_lockstep_are_exact() -> None:
    with pytest.raises(InvalidInput, match="product: got 'difference'"):
        LockstepObjective(by_differences(mlp(), "float32"))
