"""Gradients of many points in one pass are those one by one; models that cannot go one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from thalweg.loss.objective import Objective
from thalweg.operators.hessian import Hessian

ALL = 10**6


class Deciding(nn.Module):
    """Control flow that depends on data and parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        found = self.inner(inputs)
        return found.tanh() if float(found.detach().sum()) < 1e6 else found


class Counting(nn.Module):
    """A buffer written in place, with numbers of the point."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)
        self.register_buffer("seen", torch.zeros(3, dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Tensor:
        found = self.inner(inputs).tanh()
        self.seen.add_(found.detach().mean(0))
        return found


class Own(torch.autograd.Function):
    """A function without a rule for `vmap`."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        ctx.save_for_backward(inputs)
        return inputs.sin()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Tensor:
        (inputs,) = ctx.saved_tensors
        return outer[0] * inputs.cos()


class Sine(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return Own.apply(inputs)  # type: ignore[return-value]


def smooth() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 3))


UNFIT: dict[str, Any] = {
    "decides": Deciding,
    "writes": Counting,
    "own function": lambda: nn.Sequential(nn.Linear(4, 3), Sine()),
}


def objective(model: nn.Module, up_to: int | None, **options: Any) -> Objective:
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(12, 4, generator=generator, dtype=torch.float64, device="cpu")
    targets = torch.randn(12, 3, generator=generator, dtype=torch.float64, device="cpu")
    return Objective(
        model, nn.MSELoss(), (data, targets), product="difference", vectorize_up_to=up_to, **options
    )


def built(build: Any) -> nn.Module:
    torch.manual_seed(0)
    return build().double()


def block(loss: Objective, columns: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    kind = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
    return torch.randn(loss.num_parameters, columns, **kind)


@pytest.mark.parametrize("chunk_size", [None, 40])
def test_gradients_of_many_points_are_those_one_by_one(chunk_size: int | None) -> None:
    # 40 samples in a pass: three points of the 12 samples at once.
    loss = objective(built(smooth), ALL, chunk_size=chunk_size)
    theta = loss.theta()
    gradients = loss.at_once.gradients(loss, 8, theta, None, 12.0)
    assert gradients is not None
    points = theta + 0.1 * block(loss, 7).T
    expected = torch.stack([loss.gradient(point) for point in points])
    torch.testing.assert_close(gradients(points), expected, rtol=1e-12, atol=1e-14)


def test_products_at_once_are_within_their_error_of_exact_ones() -> None:
    model = built(smooth)
    loss = objective(model, ALL)
    exact = Objective(model, nn.MSELoss(), loss.samples, product="exact")
    vectors = block(loss) * torch.tensor([1.0, 100.0, 0.0, 1e-3], dtype=torch.float64, device="cpu")
    images, error = Hessian(loss).product_with_error(vectors)
    assert error is not None
    off = (images - Hessian(exact) @ vectors).norm(dim=0)
    assert bool((off <= error).all())
    assert loss.at_once.state_dict()["shares"]


@pytest.mark.parametrize("kind", UNFIT)
def test_models_that_cannot_share_a_pass_go_one_by_one(kind: str) -> None:
    vectorized, one_by_one = (objective(built(UNFIT[kind]), up_to) for up_to in (ALL, 0))
    images = [Hessian(loss) @ block(loss) for loss in (vectorized, one_by_one)]
    assert torch.equal(*images)
    assert vectorized.at_once.state_dict()["shares"] is False
    for value in vectorized.model.buffers():
        assert not bool(value.any())


def test_a_pass_that_fails_later_is_made_one_by_one() -> None:
    class Late(Deciding):
        late = False

        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(inputs) if self.late else self.inner(inputs).tanh()

    model: Any = built(Late)
    loss = objective(model, ALL)
    expected = Hessian(loss) @ block(loss)
    assert loss.at_once.state_dict()["shares"]
    model.late = True
    found = Hessian(loss) @ block(loss)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    assert loss.at_once.state_dict()["shares"] is False


@pytest.mark.parametrize("shares", [True, False])
def test_a_resumed_loss_goes_on_bit_for_bit(shares: bool) -> None:
    build = smooth if shares else Deciding
    loss = objective(built(build), None)
    _ = Hessian(loss) @ block(loss)
    other = objective(built(build), None)
    other.load_state_dict(loss.state_dict())
    moved = 1.01 * loss.theta()
    images = [each.linearize(moved).multiply(block(each).T) for each in (loss, other)]
    assert torch.equal(*images)


@pytest.mark.parametrize(("build", "shares"), [(smooth, True), (lambda: Deciding(), False)])
def test_it_is_chosen_by_sizes(build: Any, shares: bool) -> None:
    loss = objective(built(build), None)
    _ = Hessian(loss) @ block(loss)
    assert loss.at_once.state_dict()["shares"] is shares


def test_convolutions_and_large_chunks_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    folded = nn.Sequential(
        nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 3, 2), nn.Flatten(), nn.Linear(9, 3)
    )
    loss = objective(built(lambda: folded), None)
    _ = Hessian(loss) @ block(loss)
    assert loss.at_once.state_dict()["shares"] is None
    monkeypatch.setattr("thalweg.loss.points_at_once.MOST_WORK", 100)
    large = objective(built(smooth), None)
    _ = Hessian(large) @ block(large)
    assert large.at_once.state_dict()["shares"] is None
