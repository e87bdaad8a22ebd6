"""Cross-entropy in closed form and attention recomputed are torch's, up to third derivatives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests import dense
from thalweg.loss import large_operations
from thalweg.loss.large_operations import LargeOperations
from thalweg.loss.objective import Objective
from thalweg.operators import GaussNewton, Hessian

ROWS, CLASSES, LENGTH = 70, 1100, 256


@pytest.fixture(autouse=True)
def _any_size(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(LargeOperations, "least_logits", 0)
    monkeypatch.setattr(LargeOperations, "least_scores", 0)
    with sdpa_kernel(SDPBackend.MATH):
        yield


def derivatives(
    function: Callable[..., Tensor], inputs: list[Tensor], order: int
) -> tuple[Tensor, ...]:
    """The value, or what is left of it after some derivatives along fixed random directions."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    found = function(*inputs)
    for i in range(order):
        parts = torch.autograd.grad(found, inputs, create_graph=True)
        generator = torch.Generator().manual_seed(i)
        along = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parts]
        found = sum((part * v).sum() for part, v in zip(parts, along, strict=True))
        assert isinstance(found, Tensor)
    return torch.autograd.grad(found, inputs)


def both(function: Callable[..., Tensor], inputs: list[Tensor], order: int) -> float:
    """How far the two ways are apart, relative."""
    expected = derivatives(function, inputs, order)
    with LargeOperations():
        found = derivatives(function, inputs, order)
    pairs = zip(found, expected, strict=True)
    return max(dense.relative(a, b) for a, b in pairs if float(b.norm()))


def logits() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(6, CLASSES, generator=generator, dtype=torch.float64)
    return [weights, torch.randn(ROWS, 6, generator=generator, dtype=torch.float64)]


def target() -> Tensor:
    chosen = torch.randint(0, CLASSES, (ROWS,), generator=torch.Generator().manual_seed(1))
    chosen[[3, 40]] = -100
    return chosen


def is_closed(loss: Tensor) -> bool:
    node = loss.grad_fn
    while node is not None and type(node).__name__ != "_CrossEntropyBackward":
        node = node.next_functions[0][0] if node.next_functions else None
    return node is not None


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_cross_entropy_is_that_of_torch(reduction: str, order: int) -> None:
    def loss(weights: Tensor, states: Tensor) -> Tensor:
        # A factor that depends on the inputs, so that its gradient has one as well.
        scale = states.square().mean()
        return scale * functional.cross_entropy(states @ weights, target(), reduction=reduction)

    assert both(loss, logits(), order) < 1e-12

    def of_sequences(weights: Tensor, states: Tensor) -> Tensor:
        z = (states.unflatten(0, (7, -1)) @ weights).transpose(1, 2)
        return functional.cross_entropy(z, target().unflatten(0, (7, -1)), reduction=reduction)

    assert both(of_sequences, logits(), order) < 1e-12


def test_the_value_is_that_of_torch() -> None:
    weights, states = logits()
    z = (states @ weights).requires_grad_()
    with LargeOperations():
        found = functional.cross_entropy(z, target())
    assert is_closed(found)
    expected = functional.cross_entropy(z, target())
    assert dense.relative(found.detach(), expected.detach()) < 1e-14
    with LargeOperations():
        nothing = functional.cross_entropy(z, torch.full((ROWS,), -100))
    assert bool(nothing.isnan())


@pytest.mark.parametrize(
    "options",
    [
        {"weight": torch.rand(CLASSES, dtype=torch.float64)},
        {"label_smoothing": 0.1},
        {"reduction": "none"},
    ],
)
def test_what_is_not_covered_is_left_to_torch(options: dict[str, Any]) -> None:
    weights, states = logits()
    z = (states @ weights).requires_grad_()
    with LargeOperations():
        found = functional.cross_entropy(z, target(), **options)
    assert not is_closed(found.sum())
    assert torch.equal(found, functional.cross_entropy(z, target(), **options))


def test_probabilities_and_small_losses_are_left_to_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights, states = logits()
    z = (states @ weights).requires_grad_()
    with LargeOperations():
        assert not is_closed(functional.cross_entropy(z, z.detach().softmax(1)))
    monkeypatch.setattr(LargeOperations, "least_logits", large_operations.LEAST_LOGITS)
    with LargeOperations():
        assert not is_closed(functional.cross_entropy(z, target()))


def heads() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (1, 2, LENGTH, 4)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize(
    "options", [{"is_causal": True}, {"attn_mask": torch.rand(LENGTH, LENGTH) > 0.3}]
)
def test_attention_is_that_of_torch(options: dict[str, Any], order: int) -> None:
    def loss(*parts: Tensor) -> Tensor:
        mixed = functional.scaled_dot_product_attention(parts[0], parts[1], parts[2], **options)
        return mixed.square().mean().sin()

    assert both(loss, heads(), order) < 1e-12


class Language(nn.Module):
    """A block of attention over a large vocabulary; its head is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.qkv = nn.Embedding(CLASSES, 4), nn.Linear(4, 12)

    def forward(self, tokens: Tensor) -> Tensor:
        states = self.embedding(tokens)
        query, key, value = self.qkv(states).unsqueeze(1).chunk(3, dim=-1)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return functional.linear(states + mixed.squeeze(1), self.embedding.weight).flatten(0, 1)


def cross_entropy(output: Tensor, tokens: Tensor) -> Tensor:
    return functional.cross_entropy(output, tokens.flatten())


def objective(**options: Any) -> Objective:
    torch.manual_seed(1)
    data = torch.randint(0, CLASSES, (2, LENGTH)), torch.randint(0, CLASSES, (2, LENGTH))
    return Objective(Language().double(), cross_entropy, data, check=False, **options)


@pytest.mark.parametrize("operator", [Hessian, GaussNewton])
@pytest.mark.parametrize("vectorize_up_to", [0, 1000])
def test_products_with_a_language_model_are_the_same(
    operator: Any, vectorize_up_to: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = objective(vectorize_up_to=0)
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(loss.num_parameters, 3, generator=generator, dtype=torch.float64)
    found = operator(objective(vectorize_up_to=0)) @ block
    if vectorize_up_to:
        # What has no vectorized way is multiplied one by one, where nobody insists.
        assert dense.relative(operator(objective()) @ block, found) < 1e-12
    monkeypatch.setattr(LargeOperations, "least_logits", 10**9)
    monkeypatch.setattr(LargeOperations, "least_scores", 10**9)
    assert dense.relative(found, operator(loss) @ block) < 1e-12


def test_they_are_in_force_in_exact_products_alone() -> None:
    seen = []

    def loss(output: Tensor, tokens: Tensor) -> Tensor:
        value = cross_entropy(output, tokens)
        seen.append(is_closed(value))
        return value

    exact = objective()
    exact.evaluator._loss_of_batch._loss[0] = loss
    _ = Hessian(exact) @ exact.theta()
    assert all(seen)
    seen.clear()
    by_differences = objective(product="difference")
    by_differences.evaluator._loss_of_batch._loss[0] = loss
    _ = by_differences.gradient()
    assert not any(seen)


def test_a_model_without_such_operations_is_evaluated_without_the_mode() -> None:
    model, data = nn.Linear(3, 2), (torch.randn(8, 3), torch.randint(0, 2, (8,)))
    small = Objective(model, nn.CrossEntropyLoss(), data)
    _ = Hessian(small) @ small.theta()
    assert not small.evaluator._large.wanted
    large = objective()
    _ = Hessian(large) @ large.theta()
    assert large.evaluator._large.wanted
