from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import dense
from tests.networks import CASES
from tests.sampling import few
from thalweg.errors import InvalidInput
from thalweg.loss.chunk_multiplier import EVERY_SIZE
from thalweg.loss.objective import Objective
from thalweg.operators.gauss_newton import GaussNewton, ResidualHessian
from thalweg.operators.hessian import Hessian

WAYS = [
    (name, vectorize_up_to)
    for name in CASES
    for vectorize_up_to in (0, EVERY_SIZE)
    # Vectorized derivatives are not implemented for group norm and max-pooling.
    if (name, vectorize_up_to) != ("cnn", EVERY_SIZE)
]


def block(size: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(size, 4, generator=generator, dtype=torch.float64).to(dtype)


@pytest.fixture(scope="module")
def references() -> dict[str, tuple[Tensor, Tensor]]:
    """Hessian and Gauss-Newton matrix of each network, in float64."""
    found = {}
    for name, build in CASES.items():
        case = build().to(torch.float64)
        theta = dense.flat_parameters(case)
        found[name] = dense.hessian(dense.flat_loss(case), theta), dense.gauss_newton(case, theta)
    return found


@pytest.mark.parametrize(("name", "vectorize_up_to"), few(4, [*WAYS[::2], *WAYS[1::2]]))
@pytest.mark.parametrize(
    ("dtype", "tolerance"), few(1, [(torch.float64, 1e-9), (torch.float32, 1e-4)])
)
def test_products_agree_with_the_dense_matrices(
    name: str,
    vectorize_up_to: int,
    dtype: torch.dtype,
    tolerance: float,
    references: dict[str, Any],
) -> None:
    case = CASES[name]().to(dtype)
    hessian, gauss_newton = references[name]
    loss = Objective(
        case.model, case.loss, case.data, chunk_size=5, vectorize_up_to=vectorize_up_to
    )
    vectors = block(loss.num_parameters, dtype)
    full = (hessian @ vectors.double()).norm()
    for operator, matrix in (
        (GaussNewton(loss), gauss_newton),
        (ResidualHessian(loss), hessian - gauss_newton),
    ):
        expected = matrix @ vectors.double()
        # A residual may be small: relative to H v.
        assert (operator @ vectors - expected).norm() < tolerance * full
        assert (operator @ vectors[:, 0] - expected[:, 0]).norm() < tolerance * full
        assert operator.num_matvecs == 5
        assert operator.gradient is not None
        assert torch.allclose(operator.gradient, loss.gradient(), atol=1e-6)


def test_it_is_positive_semidefinite_where_the_hessian_is_not(references: dict[str, Any]) -> None:
    hessian, _ = references["mlp"]
    assert torch.linalg.eigvalsh(hessian)[0] < -1e-2
    case = CASES["mlp"]().to(torch.float64)
    loss = Objective(case.model, case.loss, case.data)
    matrix = GaussNewton(loss) @ torch.eye(loss.num_parameters, dtype=torch.float64)
    assert torch.linalg.eigvalsh(matrix)[0] > -1e-12


def test_of_a_model_that_returns_its_own_loss_the_logits_are_the_outputs() -> None:
    case = CASES["silu"]().to(torch.float64)

    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = case.model

        def forward(self, inputs: Tensor, labels: Tensor) -> SimpleNamespace:
            logits = self.model(inputs)
            hidden = logits * 2  # another output, on the way to nothing
            return SimpleNamespace(loss=case.loss(logits, labels), logits=logits, hidden=hidden)

    inputs, labels = case.data
    own = Objective(WithLoss(), None, {"inputs": inputs, "labels": labels})
    plain = Objective(case.model, case.loss, case.data)
    vectors = block(plain.num_parameters, torch.float64)
    assert torch.allclose(GaussNewton(own) @ vectors, GaussNewton(plain) @ vectors, atol=1e-12)


def test_a_model_that_returns_nothing_but_its_loss_has_none() -> None:
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.layer(inputs).square().mean()

    loss = Objective(Loss(), None, (torch.randn(5, 3),))
    with pytest.raises(InvalidInput, match=r"GaussNewton.*\.logits"):
        _ = GaussNewton(loss) @ torch.ones(4)
    _ = Hessian(loss) @ torch.ones(4)
