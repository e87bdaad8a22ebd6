"""Which layer does a name stand for?"""

from __future__ import annotations

from torch import nn

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "elu": nn.ELU,
    "softplus": nn.Softplus,
    "identity": nn.Identity,
}
_POOLINGS: dict[str, type[nn.Module]] = {"max": nn.MaxPool2d, "avg": nn.AvgPool2d}


def activation_layer(name: str) -> nn.Module:
    """The activation of that name, without parameters."""
    return _ACTIVATIONS[name]()


def pooling_layer(name: str) -> nn.Module:
    """Pooling of 2x2 pixels, "max" or "avg"."""
    return _POOLINGS[name](2)


def normalization_layer(name: str, channels: int, groups: int) -> nn.Module:
    """Layer "group", "batch" or "none" for images with that many channels."""
    if name == "group":
        return nn.GroupNorm(groups, channels)
    if name == "batch":
        return nn.BatchNorm2d(channels)
    return nn.Identity()
