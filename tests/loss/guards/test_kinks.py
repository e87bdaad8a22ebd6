"""Kinks are found by operations, not by classes, and named by their layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests import networks
from thalweg.loss.guards.kinks import first_kink

KINKED: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "leaky": F.leaky_relu,
    "relu6": F.relu6,
    "prelu": lambda x: F.prelu(x, x.new_full((1,), 0.2)),
    "hardtanh": F.hardtanh,
    "hardswish": F.hardswish,
    "selu": F.selu,
    "elu of another slope": lambda x: F.elu(x, 0.5),
    "max pool 1d": lambda x: F.max_pool1d(x.flatten(1, 2), 2),
    "max pool 2d": lambda x: F.max_pool2d(x, 2),
    "adaptive max pool": lambda x: F.adaptive_max_pool2d(x, 2),
    "abs": torch.abs,
    "clamp": lambda x: x.clamp(min=0),
    "maximum": lambda x: torch.maximum(x, x.new_zeros(())),
    "max": lambda x: x.max(-1).values,
    "sort": lambda x: x.sort().values,
    "topk": lambda x: x.topk(2).values,
    "l1": lambda x: F.l1_loss(x, x.detach() + 1),
    "norm 1": lambda x: x.norm(1),
    "hinge": lambda x: F.margin_ranking_loss(x, x.detach(), torch.ones_like(x)),
}
SMOOTH: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "silu": F.silu,
    "elu": F.elu,
    "celu": lambda x: F.celu(x, 0.5),
    "softplus": F.softplus,
    "norm 2": torch.linalg.vector_norm,
    "normalize": F.normalize,
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
    "huber": lambda x: F.huber_loss(x, x.detach() + 1),
    "average": lambda x: F.avg_pool2d(x, 2),
    "masked": lambda x: x.masked_fill(torch.ones_like(x).tril() == 0, -1e9).softmax(-1),
    "dropout": F.dropout,
}


class Applied(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.function = nn.Parameter(torch.ones(8)), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.weight * x)


def kink_of(model: nn.Module, *inputs: Any) -> str:
    return first_kink(model, lambda: model(*inputs).sum())


@pytest.mark.parametrize("name", KINKED)
def test_an_operation_with_a_kink_is_found(name: str) -> None:
    assert kink_of(Applied(KINKED[name]), torch.randn(2, 2, 8, 8)) == "the model (Applied)"


@pytest.mark.parametrize("name", SMOOTH)
def test_a_smooth_operation_is_none(name: str) -> None:
    assert kink_of(Applied(SMOOTH[name]), torch.randn(2, 2, 8, 8)) == ""


def test_the_innermost_layer_is_named() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Tanh(), nn.Hardtanh()), nn.ReLU())
    assert kink_of(model, torch.randn(2, 8)) == "layer '1.1' (Hardtanh)"


def test_a_kink_of_the_inputs_alone_is_none() -> None:
    model = nn.Linear(8, 8)
    assert first_kink(model, lambda: model(torch.randn(2, 8).relu()).sum()) == ""


def test_a_kink_in_the_loss_is_named() -> None:
    model = nn.Linear(8, 8)
    assert first_kink(model, lambda: F.l1_loss(model(torch.ones(2, 8)), torch.ones(2, 8))) == (
        "the loss (Abs)"
    )


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_kinks_inside_of_checkpoints_are_found(use_reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            def inside(x: Tensor) -> Tensor:
                return self.second(x).relu()

            return checkpoint(inside, self.first(x), use_reentrant=use_reentrant)  # type: ignore[return-value]

    assert kink_of(Checkpointed(), torch.randn(2, 8)) != ""


def test_hooks_are_taken_away_again() -> None:
    case = networks.cnn()
    assert kink_of(case.model, case.data[0]) == "layer '2' (ReLU)"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in case.model.modules())
