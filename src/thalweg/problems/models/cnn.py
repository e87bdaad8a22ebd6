"""The small convolutional network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from thalweg.errors import InvalidInput
from thalweg.problems.data.dataset import InputShape
from thalweg.problems.models.choices import Activation, Count, need_images
from thalweg.registry import models
from thalweg.settings import Settings, bad_value

if TYPE_CHECKING:
    from typing import Self

    from torch import nn


@models.register("cnn")
class CNN(Settings):
    """Convolutions of one width, each with activation and pooling, then a linear output.

    The paper's "3 layers" of width 32 are read as two convolutions and the linear one, as in the
    public code nearest to the authors'; depth = 3 is the other reading. Images keep their size in a
    convolution (zero padding) unless `stride` is above 1; pooling halves it.
    """

    width: Count = Field(default=32, description="channels of each convolution")
    depth: Count = Field(default=2, description="number of convolutions")
    kernel: Count = Field(default=3, description="height and width of a kernel, odd")
    stride: Count = Field(default=1, description="step of the kernel, in pixels")
    pooling: Literal["max", "avg", "none"] = Field(
        default="max", description="2x2 after each convolution"
    )
    activation: Activation = Field(default="relu", description="after each convolution")
    bias: bool = Field(default=True, description="convolutions with a bias")

    @model_validator(mode="after")
    def _kernel_is_odd(self) -> Self:
        if self.kernel % 2 == 0:
            raise bad_value(
                "kernel", self.kernel, "an odd number", "so that images keep their size"
            )
        return self

    def build(self, inputs: InputShape, outputs: int) -> nn.Module:
        from torch import nn

        from thalweg.problems.models.layers import activation_layer, pooling_layer

        channels, height, width = need_images(self, inputs)
        size, layers = f"{height}x{width}", list[nn.Module]()
        for depth in range(1, self.depth + 1):
            padding = self.kernel // 2
            layers += [
                nn.Conv2d(channels, self.width, self.kernel, self.stride, padding, bias=self.bias),
                activation_layer(self.activation),
            ]
            if self.pooling != "none":
                layers.append(pooling_layer(self.pooling))
            channels = self.width
            height, width = self._size_after(height), self._size_after(width)
            if height == 0 or width == 0:
                raise InvalidInput(
                    f"model cnn: images of {size} pixels vanish in layer {depth} of {self.depth};"
                    " choose a smaller depth or stride, or pooling 'none'"
                )
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * height * width, outputs))

    def _size_after(self, size: int) -> int:
        """Height or width of an image after a convolution and its pooling."""
        size = (size - 1) // self.stride + 1
        return size if self.pooling == "none" else size // 2
