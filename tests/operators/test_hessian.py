from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests import dense
from tests.networks import CASES, mlp
from tests.sampling import few
from thalweg.errors import Diverged, InvalidInput
from thalweg.loss.chunk_multiplier import EVERY_SIZE, ChunkMultiplier
from thalweg.loss.objective import Objective
from thalweg.operators.hessian import Hessian
from thalweg.operators.symmetric import DenseOperator

# Vectorized second derivatives are not implemented for group norm and max-pooling.
WAYS = [
    (name, vectorize_up_to)
    for name in CASES
    for vectorize_up_to in (0, EVERY_SIZE, None)
    if (name, vectorize_up_to) != ("cnn", EVERY_SIZE)
]


def block(size: int, k: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(size, k, generator=generator, dtype=torch.float64).to(dtype)


def objective(name: str, dtype: torch.dtype, **options: Any) -> Objective:
    case = CASES[name]().to(dtype)
    return Objective(case.model, case.loss, case.data, **options)


@pytest.fixture(scope="module")
def references() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Gradient and dense Hessian of each network, in float64."""
    found = {}
    for name, build in CASES.items():
        case = build().to(torch.float64)
        loss, theta = dense.flat_loss(case), dense.flat_parameters(case)
        found[name] = dense.gradient(loss, theta), dense.hessian(loss, theta)
    return found


@pytest.mark.parametrize("name", few(2, ["cnn", "attention", "mlp", "silu"]))
def test_the_dense_reference_agrees_with_differences_of_the_gradient(
    name: str, references: dict[str, Any]
) -> None:
    case = CASES[name]().to(torch.float64)
    loss, theta = dense.flat_loss(case), dense.flat_parameters(case)
    vector = block(len(theta), 1)[:, 0]
    vector = vector / vector.norm()
    _, matrix = references[name]
    assert dense.relative(dense.differences(loss, theta, vector), matrix @ vector) < 1e-8


@pytest.mark.parametrize(("name", "vectorize_up_to"), WAYS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), few(1, [(torch.float64, 1e-9), (torch.float32, 1e-4)])
)
def test_gradient_and_products_agree_with_the_dense_hessian(
    name: str,
    vectorize_up_to: int | None,
    dtype: torch.dtype,
    tolerance: float,
    references: dict[str, Any],
) -> None:
    gradient, matrix = references[name]
    loss = objective(name, dtype, vectorize_up_to=vectorize_up_to, chunk_size=5)
    hessian = Hessian(loss)
    vectors = block(loss.num_parameters, 4, dtype)
    assert dense.relative(Hessian(loss, keep_graph=True).gradient, gradient) < tolerance
    assert dense.relative(hessian @ vectors, matrix @ vectors.double()) < tolerance
    assert dense.relative(hessian @ vectors[:, 0], matrix @ vectors[:, 0].double()) < tolerance
    assert dense.relative(hessian.gradient, gradient) < tolerance
    assert dense.relative(loss.gradient(), gradient) < tolerance
    assert hessian.num_matvecs == 5


@pytest.mark.parametrize("name", few(2, CASES))
def test_a_hessian_of_some_samples_is_that_of_their_mean_loss(name: str) -> None:
    case = CASES[name]().to(torch.float64)
    rows = torch.tensor([5, 0, 3, 7])
    loss = dense.flat_loss(case, rows=rows)
    theta = dense.flat_parameters(case)
    matrix = dense.hessian(loss, theta)
    hessian = Hessian(Objective(case.model, case.loss, case.data, chunk_size=3), samples=rows)
    identity = torch.eye(len(theta), dtype=torch.float64)
    assert dense.relative(hessian @ identity, matrix) < 1e-9


@pytest.mark.parametrize("keep_graph", [False, True])
def test_kept_graphs_multiply_as_fresh_ones_do(keep_graph: bool) -> None:
    loss = objective("mlp", torch.float64, chunk_size=4)
    vectors = block(loss.num_parameters, 2)
    hessian = Hessian(loss, keep_graph=keep_graph)
    first = hessian @ vectors
    assert torch.equal(hessian @ vectors, first)


@pytest.mark.parametrize("name", few(1, ["cnn", "attention", "mlp", "silu"]))
def test_restricted_to_parameters_it_is_a_block_of_the_whole(name: str) -> None:
    case = CASES[name]().to(torch.float64)
    whole = Objective(case.model, case.loss, case.data)
    pattern = whole.layout.names[1]
    part = Objective(case.model, case.loss, case.data, parameters=[pattern])
    begin = whole.layout.sizes[0]
    end = begin + whole.layout.sizes[1]
    matrix = Hessian(whole) @ torch.eye(whole.num_parameters, dtype=torch.float64)
    block_of_part = Hessian(part) @ torch.eye(part.num_parameters, dtype=torch.float64)
    assert dense.relative(block_of_part, matrix[begin:end, begin:end]) < 1e-9
    assert dense.relative(part.gradient(), whole.gradient()[begin:end]) < 1e-9


def test_frozen_parameters_are_constants() -> None:
    case = mlp().to(torch.float64)
    case.model[2].requires_grad_(False)  # type: ignore[index]
    names = dense.parameter_names(case)
    loss, theta = dense.flat_loss(case, names), dense.flat_parameters(case, names)
    hessian = Hessian(Objective(case.model, case.loss, case.data))
    identity = torch.eye(len(theta), dtype=torch.float64)
    assert dense.relative(hessian @ identity, dense.hessian(loss, theta)) < 1e-9


def test_the_hessian_is_taken_at_the_theta_given() -> None:
    case = mlp().to(torch.float64)
    theta = dense.flat_parameters(case) + 0.3
    matrix = dense.hessian(dense.flat_loss(case), theta)
    vectors = block(len(theta), 2)
    loss = Objective(case.model, case.loss, case.data)
    assert dense.relative(Hessian(loss, theta) @ vectors, matrix @ vectors) < 1e-9


def test_a_hessian_without_theta_stays_where_it_was_made() -> None:
    case = mlp().to(torch.float64)
    loss = Objective(case.model, case.loss, case.data)
    hessian = Hessian(loss)
    vectors = block(loss.num_parameters, 2)
    before = hessian @ vectors
    loss.layout.write(case.model, loss.theta() + 1)
    assert torch.equal(hessian @ vectors, before)


def test_the_hessian_of_a_linear_loss_is_zero() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return (inputs * self.weight).sum(1).mean()

    loss = Objective(Sum(), None, (torch.randn(5, 3),))
    for vectorize_up_to in (0, EVERY_SIZE):
        loss.multiplier = ChunkMultiplier(vectorize_up_to)
        assert not (Hessian(loss) @ torch.eye(3)).any()


def test_wrong_shapes_are_refused() -> None:
    loss = objective("mlp", torch.float32)
    with pytest.raises(InvalidInput, match="P="):
        _ = Hessian(loss) @ torch.zeros(3)
    with pytest.raises(InvalidInput, match="P="):
        _ = Hessian(loss) @ torch.zeros(loss.num_parameters, 2, 2)
    with pytest.raises(InvalidInput, match="theta"):
        Hessian(loss, torch.zeros(3))
    with pytest.raises(InvalidInput, match="square"):
        DenseOperator(torch.zeros(2, 3))


def test_a_nan_loss_or_product_is_divergence() -> None:
    loss = objective("mlp", torch.float32)
    theta = loss.theta()
    theta[0] = float("nan")
    with pytest.raises(Diverged, match="loss"):
        _ = Hessian(loss, theta) @ block(loss.num_parameters, 2, torch.float32)
    vectors = torch.full((loss.num_parameters, 2), float("inf"))
    with pytest.raises(Diverged, match="product"):
        _ = Hessian(loss) @ vectors


def test_a_dense_operator_counts_its_products() -> None:
    operator = DenseOperator(torch.eye(3))
    _ = operator @ torch.ones(3)
    _ = operator @ torch.ones(3, 4)
    assert operator.num_matvecs == 5
    assert (operator.shape, operator.dtype) == ((3, 3), torch.float32)


def test_a_dense_operator_refuses_what_does_not_fit_and_counts_what_does() -> None:
    with pytest.raises(InvalidInput, match=r"matrix: got \(2, 3\)"):
        DenseOperator(torch.ones(2, 3))
    operator = DenseOperator(torch.eye(3))
    for unfit in (torch.ones(2), torch.ones(2, 3), torch.ones(3, 1, 1)):
        with pytest.raises(InvalidInput, match="vector: got"):
            _ = operator @ unfit
    assert torch.equal(operator @ torch.eye(3), torch.eye(3))
    assert (operator @ torch.ones(3)).shape == (3,)
    assert operator.num_matvecs == 4
