"""Settings of ResNet-8; the network is in `resnet_network.py`, where PyTorch is imported."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from thalweg.problems.data.dataset import InputShape
from thalweg.problems.models.choices import Activation, Count, check_groups, need_images
from thalweg.registry import models
from thalweg.settings import Settings

if TYPE_CHECKING:
    from typing import Self

    from torch import nn


@models.register("resnet8")
class ResNet8(Settings):
    """ResNet-8 for small images (He et al. 2016, section 4.2, n = 1).

    One convolution, three residual blocks of two convolutions with widths w, 2w, 4w (the second and
    third halve the image), the mean over pixels, a linear output. Convolutions have no bias.
    `shortcut`: where the width changes, a 1x1 convolution with normalization ("projection", B in
    the source) or zeros in the added channels ("pad", A).
    """

    width: Count = Field(default=16, description="channels of the first block")
    norm: Literal["group", "batch"] = Field(
        default="group", description="normalization after each convolution"
    )
    groups: Count = Field(default=8, description="groups of group normalization")
    activation: Activation = Field(default="relu", description="after each normalization")
    shortcut: Literal["projection", "pad"] = Field(
        default="projection", description="of a block that widens"
    )

    @model_validator(mode="after")
    def _groups_divide_width(self) -> Self:
        check_groups(self.norm, self.groups, self.width)
        return self

    def build(self, inputs: InputShape, outputs: int) -> nn.Module:
        channels, _, _ = need_images(self, inputs)
        from thalweg.problems.models.resnet_network import ResNet

        return ResNet(channels, outputs, **self.model_dump())
