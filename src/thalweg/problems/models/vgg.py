"""VGG-11, the network of Simonyan and Zisserman 2015 (arXiv 1409.1556, table 1, column A)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import nn

from thalweg.problems.models.activation import activation
from thalweg.problems.models.cnn import POOLINGS
from thalweg.problems.models.normalization import normalization

if TYPE_CHECKING:
    from thalweg.problems.models.settings import VGG11

_STAGES = ((1,), (2,), (4, 4), (8, 8), (8, 8))
"""Widths of the convolutions between two poolings, in units of the first."""


def vgg11(settings: VGG11, inputs: tuple[int, int, int], outputs: int) -> nn.Sequential:
    """From images (n, channels, height, width), at least 32x32, to outputs (n, outputs)."""
    channels, height, width = inputs
    layers: list[nn.Module] = []
    for stage in _STAGES:
        for factor in stage:
            layers.append(_convolution(settings, channels, factor * settings.width))
            channels = factor * settings.width
            layers.append(normalization(settings.norm, channels, settings.groups))
            layers.append(activation(settings.activation))
        layers.append(POOLINGS[settings.pooling](2))
    layers.append(nn.Flatten())
    features = channels * (height // 32) * (width // 32)
    for hidden in settings.classifier:
        layers += [nn.Linear(features, hidden), activation(settings.activation)]
        features = hidden
    return nn.Sequential(*layers, nn.Linear(features, outputs))


def _convolution(settings: VGG11, before: int, after: int) -> nn.Conv2d:
    layer = nn.Conv2d(before, after, kernel_size=3, padding=1)
    if settings.initialization == "he":
        nn.init.normal_(layer.weight, std=math.sqrt(2 / (9 * after)))
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return layer
