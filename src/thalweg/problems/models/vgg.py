"""VGG-11, the network of Simonyan and Zisserman 2015 (arXiv 1409.1556, table 1, column A)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from thalweg.errors import InvalidInput
from thalweg.problems.data.dataset import InputShape
from thalweg.problems.models.choices import Activation, Count, check_groups, need_images
from thalweg.registry import models
from thalweg.settings import Settings

if TYPE_CHECKING:
    from typing import Self

    from torch import nn

_STAGES = ((1,), (2,), (4, 4), (8, 8), (8, 8))
"""Widths of the convolutions between two poolings, in units of the first."""


@models.register("vgg11")
class VGG11(Settings):
    """VGG-11 (Simonyan, Zisserman 2015, table 1, A) for images of 32x32 pixels or more.

    Eight convolutions of width w, 2w, 4w, 4w, 8w, 8w, 8w, 8w with five poolings, then linear
    layers; w = 64, two hidden ones of 512 and no dropout as in public code for CIFAR-10.
    `initialization`: "he" draws convolutions from N(0, 2 / (kernel area * output channels)), with
    zero bias, as that code does.
    """

    width: Count = Field(default=64, description="channels of the first convolution")
    norm: Literal["none", "group", "batch"] = Field(
        default="none", description="normalization after each convolution"
    )
    groups: Count = Field(default=8, description="groups of group normalization")
    pooling: Literal["max", "avg"] = Field(default="max", description="2x2, five times")
    activation: Activation = Field(default="relu", description="after each hidden layer")
    classifier: tuple[Count, ...] = Field(
        default=(512, 512), description="widths of the hidden linear layers"
    )
    initialization: Literal["default", "he"] = Field(
        default="default", description="of the convolutions; default: PyTorch's"
    )

    @model_validator(mode="after")
    def _groups_divide_width(self) -> Self:
        check_groups(self.norm, self.groups, self.width)
        return self

    def build(self, inputs: InputShape, outputs: int) -> nn.Module:
        channels, height, width = need_images(self, inputs)
        if min(height, width) < 32:
            raise InvalidInput(
                f"model vgg11: images of {height}x{width} pixels, its five poolings need at least "
                "32x32; choose model cnn or resnet8"
            )
        from torch import nn

        from thalweg.problems.models.layers import (
            activation_layer,
            normalization_layer,
            pooling_layer,
        )

        layers: list[nn.Module] = []
        for stage in _STAGES:
            for factor in stage:
                layers.append(self._convolution(channels, factor * self.width))
                channels = factor * self.width
                layers.append(normalization_layer(self.norm, channels, self.groups))
                layers.append(activation_layer(self.activation))
            layers.append(pooling_layer(self.pooling))
        layers.append(nn.Flatten())
        features = channels * (height // 32) * (width // 32)
        for hidden in self.classifier:
            layers += [nn.Linear(features, hidden), activation_layer(self.activation)]
            features = hidden
        return nn.Sequential(*layers, nn.Linear(features, outputs))

    def _convolution(self, before: int, after: int) -> nn.Conv2d:
        from torch import nn

        layer = nn.Conv2d(before, after, kernel_size=3, padding=1)
        if self.initialization == "he":
            nn.init.normal_(layer.weight, std=math.sqrt(2 / (9 * after)))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        return layer
