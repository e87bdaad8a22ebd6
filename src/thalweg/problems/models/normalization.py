"""How are the channels of a convolution normalized?"""

from __future__ import annotations

from torch import nn


def normalization(name: str, channels: int, groups: int) -> nn.Module:
    """Layer "group", "batch" or "none" for images with that many channels."""
    if name == "group":
        return nn.GroupNorm(groups, channels)
    if name == "batch":
        return nn.BatchNorm2d(channels)
    return nn.Identity()
