from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests import dense
from tests.networks import CASES, Case
from tests.sampling import few
from thalweg.errors import InvalidInput
from thalweg.loss.objective import Objective
from thalweg.operators.gradient_covariance import GradientCovariance


def gradients(case: Case, batch_size: int = 1) -> Tensor:
    """One gradient after another, as rows (n / b, P)."""
    theta = dense.flat_parameters(case)
    starts = range(0, len(case.data[0]), batch_size)
    return torch.stack(
        [
            dense.gradient(dense.flat_loss(case, rows=slice(i, i + batch_size)), theta)
            for i in starts
        ]
    )


def covariance(rows: Tensor, *, centered: bool = True) -> Tensor:
    moved = rows - rows.mean(0) if centered else rows
    return moved.T @ moved / len(rows)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("chunk_size", few(1, [4, None]))
@pytest.mark.parametrize(
    ("dtype", "tolerance"), few(1, [(torch.float64, 1e-9), (torch.float32, 1e-4)])
)
def test_products_agree_with_the_gradients_one_by_one(
    name: str, centered: bool, chunk_size: int | None, dtype: torch.dtype, tolerance: float
) -> None:
    matrix = covariance(gradients(CASES[name]().to(torch.float64)), centered=centered)
    case = CASES[name]().to(dtype)
    loss = Objective(case.model, case.loss, case.data, chunk_size=chunk_size)
    generator = torch.Generator().manual_seed(7)
    vectors = torch.randn(len(matrix), 3, generator=generator, dtype=torch.float64)
    operator = GradientCovariance(loss, centered=centered)
    image = operator @ vectors.to(dtype)
    assert dense.relative(image, matrix @ vectors) < tolerance
    assert torch.allclose(operator @ vectors[:, 0].to(dtype), image[:, 0], atol=1e-5)
    assert operator.gradient is not None
    assert torch.allclose(operator.gradient, loss.gradient(), atol=1e-6)


@pytest.mark.parametrize("chunk_size", few(1, [5, 1, 8]))
def test_batches_are_taken_in_the_order_of_the_samples(chunk_size: int) -> None:
    case = CASES["attention"]().to(torch.float64)
    matrix = covariance(gradients(case, batch_size=4))
    loss = Objective(case.model, case.loss, case.data, chunk_size=chunk_size)
    image = GradientCovariance(loss, batch_size=4) @ torch.eye(len(matrix), dtype=torch.float64)
    assert dense.relative(image, matrix) < 1e-9
    # Two batches: one direction.
    assert int(torch.linalg.matrix_rank(image)) == 1


def test_samples_that_the_loss_weighs_unequally_enter_with_their_weights() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    inputs, labels = torch.randn(6, 3).double(), torch.tensor([0, 1, 1, -100, 0, 1])
    weights = torch.tensor([1.0, 3.0], dtype=torch.float64)
    loss = Objective(model, nn.CrossEntropyLoss(weights), (inputs, labels), chunk_size=4)
    kept = labels >= 0
    case = Case(model, nn.CrossEntropyLoss(), (inputs[kept], labels[kept]))
    rows, share = gradients(case), weights[labels[kept]] / weights[labels[kept]].sum()
    moved = rows - share @ rows
    image = GradientCovariance(loss) @ torch.eye(8, dtype=torch.float64)
    assert dense.relative(image, moved.T @ (share[:, None] * moved)) < 1e-9


def test_a_model_that_cannot_be_vectorized_over_samples_is_taken_sample_by_sample() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, inputs: Tensor) -> Tensor:
            # A decision by a value: vmap refuses.
            return self.layer(inputs) * (2.0 if float(inputs.sum()) > 0 else 1.0)

    torch.manual_seed(0)
    case = Case(Branching(), nn.MSELoss(), (torch.randn(5, 3), torch.randn(5, 2)))
    case = case.to(torch.float64)
    loss = Objective(case.model, case.loss, case.data)
    image = GradientCovariance(loss) @ torch.eye(8, dtype=torch.float64)
    assert dense.relative(image, covariance(gradients(case))) < 1e-9


def test_a_batch_size_that_leaves_a_rest_is_refused() -> None:
    case = CASES["mlp"]()
    loss = Objective(case.model, case.loss, case.data)
    with pytest.raises(InvalidInput, match="batch_size: got 4, allowed: a divisor of the 11"):
        GradientCovariance(loss, batch_size=4)
    with pytest.raises(InvalidInput, match="batch_size"):
        GradientCovariance(loss, samples=torch.arange(4), batch_size=0)


def test_the_model_is_called_for_many_samples_at_once() -> None:
    calls: list[int] = []
    model = nn.Linear(3, 2)
    model.register_forward_hook(lambda *_: calls.append(1))
    loss = Objective(model, nn.MSELoss(), (torch.randn(200, 3), torch.randn(200, 2)), check=False)
    _ = GradientCovariance(loss) @ torch.ones(8)
    assert len(calls) < 10
