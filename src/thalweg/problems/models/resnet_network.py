"""ResNet-8, the residual network for small images (He et al. 2016, arXiv 1512.03385, section 4.2).

ReLU is replaced by the activation chosen; the rest is the source's.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.nn import functional

from thalweg.problems.models.layers import activation_layer, normalization_layer


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

    def __init__(
        self,
        before: int,
        after: int,
        stride: int,
        *,
        norm: str,
        groups: int,
        activation: str,
        shortcut: str,
    ) -> None:
        super().__init__()
        self.first = _convolution(before, after, 3, stride)
        self.first_norm = normalization_layer(norm, after, groups)
        self.second = _convolution(after, after, 3, 1)
        self.second_norm = normalization_layer(norm, after, groups)
        self.activation = activation_layer(activation)
        self.shortcut: nn.Module = nn.Identity()
        if before != after and shortcut == "projection":
            self.shortcut = nn.Sequential(
                _convolution(before, after, 1, stride),
                normalization_layer(norm, after, groups),
            )
        elif before != after:
            self.shortcut = _ZeroPadding(after - before, stride)

    def forward(self, images: Tensor) -> Tensor:
        inner = self.activation(self.first_norm(self.first(images)))
        inner = self.second_norm(self.second(inner))
        return self.activation(inner + self.shortcut(images))


class ResNet(nn.Module):
    """From images (n, channels, height, width) to outputs (n, outputs); see `ResNet8`."""

    def __init__(
        self,
        channels: int,
        outputs: int,
        *,
        width: int,
        norm: str,
        groups: int,
        activation: str,
        shortcut: str,
    ) -> None:
        super().__init__()
        block = partial(_Block, norm=norm, groups=groups, activation=activation, shortcut=shortcut)
        self.entry = _convolution(channels, width, 3, 1)
        self.entry_norm = normalization_layer(norm, width, groups)
        self.activation = activation_layer(activation)
        self.blocks = nn.Sequential(
            block(width, width, 1),
            block(width, 2 * width, 2),
            block(2 * width, 4 * width, 2),
        )
        self.output = nn.Linear(4 * width, outputs)

    def forward(self, images: Tensor) -> Tensor:
        images = self.activation(self.entry_norm(self.entry(images)))
        return self.output(self.blocks(images).mean(dim=(2, 3)))
