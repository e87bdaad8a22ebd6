"""ResNet-8, the residual network for small images (He et al. 2016, arXiv 1512.03385, section 4.2).

ReLU is replaced by the activation chosen; the rest is the source's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional

from thalweg.problems.models.activation import activation
from thalweg.problems.models.normalization import normalization

if TYPE_CHECKING:
    from thalweg.problems.models.settings import ResNet8


def _convolution(before: int, after: int, kernel: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(before, after, kernel, stride=stride, padding=kernel // 2, bias=False)


class _ZeroPadding(nn.Module):
    """Every second pixel, and zeros in the added channels: a shortcut without parameters."""

    def __init__(self, added: int, stride: int) -> None:
        super().__init__()
        self.added = added
        self.stride = stride

    def forward(self, images: Tensor) -> Tensor:
        kept = images[:, :, :: self.stride, :: self.stride]
        return functional.pad(kept, (0, 0, 0, 0, 0, self.added))


class _Block(nn.Module):
    """Two convolutions, and the input added to what they give."""

    def __init__(self, settings: ResNet8, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first = _convolution(before, after, 3, stride)
        self.first_norm = normalization(settings.norm, after, settings.groups)
        self.second = _convolution(after, after, 3, 1)
        self.second_norm = normalization(settings.norm, after, settings.groups)
        self.activation = activation(settings.activation)
        self.shortcut: nn.Module = nn.Identity()
        if before != after and settings.shortcut == "projection":
            self.shortcut = nn.Sequential(
                _convolution(before, after, 1, stride),
                normalization(settings.norm, after, settings.groups),
            )
        elif before != after:
            self.shortcut = _ZeroPadding(after - before, stride)

    def forward(self, images: Tensor) -> Tensor:
        inner = self.activation(self.first_norm(self.first(images)))
        inner = self.second_norm(self.second(inner))
        return self.activation(inner + self.shortcut(images))


class ResNet(nn.Module):
    """From images (n, channels, height, width) to outputs (n, outputs)."""

    def __init__(self, settings: ResNet8, channels: int, outputs: int) -> None:
        super().__init__()
        width = settings.width
        self.entry = _convolution(channels, width, 3, 1)
        self.entry_norm = normalization(settings.norm, width, settings.groups)
        self.activation = activation(settings.activation)
        self.blocks = nn.Sequential(
            _Block(settings, width, width, 1),
            _Block(settings, width, 2 * width, 2),
            _Block(settings, 2 * width, 4 * width, 2),
        )
        self.output = nn.Linear(4 * width, outputs)

    def forward(self, images: Tensor) -> Tensor:
        images = self.activation(self.entry_norm(self.entry(images)))
        return self.output(self.blocks(images).mean(dim=(2, 3)))
