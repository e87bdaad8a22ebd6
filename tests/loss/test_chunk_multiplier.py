from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.networks import CASES
from thalweg.errors import InvalidInput
from thalweg.loss import chunk_multiplier
from thalweg.loss.chunk_multiplier import EVERY_SIZE, ChunkMultiplier
from thalweg.loss.objective import Objective
from thalweg.operators.hessian import Hessian


def objective(name: str, vectorize_up_to: int | None = None) -> Objective:
    case = CASES[name]().to(torch.float64)
    return Objective(case.model, case.loss, case.data, vectorize_up_to=vectorize_up_to)


class LookingBack(torch.autograd.Function):
    """The identity, whose backward pass looks at values: not to be done for many at once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * (2 if bool(grads[0].isnan().any()) else 1)


class Unvectorized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        looked: Any = LookingBack.apply(self.first(x))
        return self.last(torch.tanh(looked))


def unvectorized(vectorize_up_to: int | None = None) -> Objective:
    generator = torch.Generator().manual_seed(0)
    model = Unvectorized().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    data = tuple(torch.randn(9, n, generator=generator, dtype=torch.float64) for n in (3, 2))
    return Objective(model, nn.MSELoss(), data, vectorize_up_to=vectorize_up_to)


def multiply(loss: Objective, samples: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    block = torch.randn(loss.num_parameters, 3, generator=generator, dtype=torch.float64)
    chosen = None if samples is None else torch.arange(samples)
    return Hessian(loss, samples=chosen) @ block


def timing(
    monkeypatch: pytest.MonkeyPatch, seconds: Callable[[bool], float], factor: float = 1.0
) -> None:
    """Let a vectorized product take `seconds(True)` and one by one `seconds(False)`."""
    asked: list[bool] = []

    def timed(compute: Callable[[], Tensor]) -> tuple[Tensor, float]:
        asked.append(bool(asked) and not asked[-1])
        return compute() * (factor if asked[-1] else 1.0), seconds(asked[-1])

    monkeypatch.setattr(chunk_multiplier, "_timed", timed)


def test_the_faster_way_is_measured_once_for_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = objective("mlp")
    timing(monkeypatch, lambda vectorized: 1.0 if vectorized else 2.0)
    multiply(loss, 4)
    assert loss.multiplier.vectorize_up_to == 4
    timing(monkeypatch, lambda vectorized: 2.0 if vectorized else 1.0)
    multiply(loss, 3)
    assert loss.multiplier.vectorize_up_to == 4
    multiply(loss, 6)
    assert loss.multiplier.state_dict() == {"up_to": 4, "beyond": 6}


def test_a_vectorized_product_that_differs_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = objective("mlp")
    timing(monkeypatch, lambda vectorized: 1.0 if vectorized else 2.0, factor=1.01)
    multiply(loss, 4)
    assert loss.multiplier.vectorize_up_to == 0


def test_a_model_without_vectorized_derivatives_is_multiplied_one_by_one() -> None:
    loss = unvectorized()
    assert torch.equal(multiply(loss), multiply(unvectorized(0)))
    assert loss.multiplier.state_dict() == {"up_to": 0, "beyond": 1}


def test_asking_for_what_a_model_does_not_have_names_the_mend() -> None:
    with pytest.raises(InvalidInput, match=r"vectorize_up_to.*None or 0 for this model"):
        multiply(unvectorized(EVERY_SIZE))


@pytest.mark.parametrize("name", CASES)
def test_both_ways_give_the_same_product(name: str) -> None:
    one_by_one = multiply(objective(name, 0))
    assert torch.allclose(multiply(objective(name, EVERY_SIZE)), one_by_one, rtol=1e-9, atol=1e-12)


def test_a_given_size_decides_without_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(chunk_multiplier, "_timed")
    loss = objective("mlp", 5)
    assert torch.allclose(multiply(loss), multiply(objective("mlp", 0)), rtol=1e-12, atol=0)


def test_what_is_known_survives_a_restart() -> None:
    known, fresh = ChunkMultiplier(), ChunkMultiplier()
    known.load_state_dict({"up_to": 7, "beyond": 30})
    fresh.load_state_dict(known.state_dict())
    assert fresh.state_dict() == {"up_to": 7, "beyond": 30}


def test_a_negative_size_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"vectorize_up_to.*-1.*>= 0"):
        ChunkMultiplier(-1)
