"""The fully connected network."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from pydantic import Field

from thalweg.problems.data.dataset import InputShape
from thalweg.problems.models.choices import Activation, Count, need_numbers
from thalweg.registry import models
from thalweg.settings import Settings

if TYPE_CHECKING:
    from torch import nn


@models.register("mlp")
class MLP(Settings):
    """Fully connected: flattened inputs, hidden layers with an activation, a linear output.

    The paper's, on MNIST: 784-200-200-10, tanh. Without hidden layers: a linear model.
    """

    hidden: tuple[Count, ...] = Field(default=(200, 200), description="widths of the hidden layers")
    activation: Activation = Field(default="tanh", description="after each hidden layer")
    bias: bool = Field(default=True, description="linear layers with a bias")

    def build(self, inputs: InputShape, outputs: int) -> nn.Module:
        need_numbers(self, inputs)
        from torch import nn

        from thalweg.problems.models.layers import activation_layer

        widths = [inputs.size, *self.hidden]
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after, self.bias), activation_layer(self.activation)]
        return nn.Sequential(*layers, nn.Linear(widths[-1], outputs, self.bias))
