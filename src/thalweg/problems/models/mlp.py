"""The fully connected network."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from thalweg.problems.models.activation import activation


def mlp(
    inputs: int, hidden: Sequence[int], outputs: int, activation_name: str, bias: bool
) -> nn.Sequential:
    """From inputs (n, ...) of `inputs` numbers each to outputs (n, outputs)."""
    widths = [inputs, *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after, bias=bias), activation(activation_name)]
    return nn.Sequential(*layers, nn.Linear(widths[-1], outputs, bias=bias))
