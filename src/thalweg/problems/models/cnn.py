"""The small convolutional network."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from thalweg.errors import InvalidInput
from thalweg.problems.models.activation import activation

if TYPE_CHECKING:
    from thalweg.problems.models.settings import CNN

POOLINGS: dict[str, type[nn.Module]] = {"max": nn.MaxPool2d, "avg": nn.AvgPool2d}


def cnn(settings: CNN, inputs: tuple[int, int, int], outputs: int) -> nn.Sequential:
    """From images (n, channels, height, width) to outputs (n, outputs).

    Raises:
        InvalidInput: the image vanishes before the last layer.
    """
    channels, height, width = inputs
    layers: list[nn.Module] = []
    for depth in range(settings.depth):
        layers.append(
            nn.Conv2d(
                channels if depth == 0 else settings.width,
                settings.width,
                settings.kernel,
                stride=settings.stride,
                padding=settings.kernel // 2,
                bias=settings.bias,
            )
        )
        layers.append(activation(settings.activation))
        if settings.pooling != "none":
            layers.append(POOLINGS[settings.pooling](2))
        height, width = _size_after(settings, height), _size_after(settings, width)
        if height == 0 or width == 0:
            raise InvalidInput(
                f"model cnn: images of {inputs[1]}x{inputs[2]} pixels vanish in layer {depth + 1} "
                f"of {settings.depth}; choose a smaller depth or stride, or pooling 'none'"
            )
    linear = nn.Linear(settings.width * height * width, outputs)
    return nn.Sequential(*layers, nn.Flatten(), linear)


def _size_after(settings: CNN, size: int) -> int:
    size = (size - 1) // settings.stride + 1
    return size if settings.pooling == "none" else size // 2
