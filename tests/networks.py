"""Small networks with loss and data, one of each kind that differentiates in its own way."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Case:
    """A model, its loss and its data."""

    model: nn.Module
    loss: Any
    data: tuple[Tensor, Tensor]

    def to(self, dtype: torch.dtype) -> Case:
        inputs, target = self.data
        inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
        target = target.to(dtype) if target.is_floating_point() else target
        return Case(self.model.to(dtype), self.loss, (inputs, target))

    def on(self, device: torch.device) -> Case:
        """A copy of it there."""
        inputs, target = (part.to(device) for part in self.data)
        return Case(copy.deepcopy(self.model).to(device), self.loss, (inputs, target))


def mlp() -> Case:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    return Case(model, nn.MSELoss(), (torch.randn(11, 4), torch.randn(11, 3)))


def silu() -> Case:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 7), nn.SiLU(), nn.Linear(7, 4))
    return Case(model, nn.CrossEntropyLoss(), (torch.randn(13, 5), torch.randint(0, 4, (13,))))


def cnn() -> Case:
    torch.manual_seed(2)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 3, 2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(12, 3),
    )
    return Case(model, nn.CrossEntropyLoss(), (torch.randn(9, 1, 6, 6), torch.randint(0, 3, (9,))))


class Attention(nn.Module):
    """One causal attention block with LayerNorm, its head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.query_key_value = nn.Linear(6, 18)
        self.before, self.after = nn.LayerNorm(6), nn.LayerNorm(6)
        self.head = nn.Linear(6, 7)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        states = self.embedding(tokens)
        parts = self.query_key_value(self.before(states)).chunk(3, dim=-1)
        query, key, value = (p.unflatten(-1, (2, 3)).transpose(1, 2) for p in parts)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        states = states + mixed.transpose(1, 2).flatten(-2)
        return self.head(self.after(states)).transpose(1, 2)


def attention() -> Case:
    torch.manual_seed(3)
    tokens = torch.randint(0, 7, (8, 6))
    return Case(Attention(), nn.CrossEntropyLoss(), (tokens[:, :-1], tokens[:, 1:]))


CASES: dict[str, Callable[[], Case]] = {
    "mlp": mlp,
    "silu": silu,
    "cnn": cnn,
    "attention": attention,
}


def digits(warm_up: int = 200) -> Case:
    """A small tanh network on 8x8 digits, half squared error, after some steps of SGD."""
    with resources.files("thalweg.problems.data").joinpath("digits.npz").open("rb") as file:
        arrays = np.load(file, allow_pickle=False)
        images, labels = (torch.from_numpy(arrays[name]) for name in ("images", "labels"))
    inputs = images.reshape(len(images), -1).float() / 16
    target = functional.one_hot(labels.long(), 10).float()
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(64, 20), nn.Tanh(), nn.Linear(20, 10))
    case = Case(model, half_squared_error, (inputs, target))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(warm_up):
        descend(case, optimizer, step)
    return case


def half_squared_error(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().sum(1).mean() / 2


def descend(case: Case, optimizer: torch.optim.Optimizer, step: int, batch_size: int = 50) -> None:
    """One step on a mini-batch that depends on the step alone."""
    generator = torch.Generator().manual_seed(step)
    chosen = torch.randint(0, len(case.data[0]), (batch_size,), generator=generator)
    optimizer.zero_grad()
    case.loss(case.model(case.data[0][chosen]), case.data[1][chosen]).backward()
    optimizer.step()
