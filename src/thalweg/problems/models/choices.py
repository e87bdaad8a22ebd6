"""What do the settings of models have in common: choices, and the inputs that they take?"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from thalweg.errors import InvalidInput
from thalweg.problems.data.dataset import InputShape
from thalweg.settings import Settings, bad_value

Activation = Literal["tanh", "relu", "silu", "gelu", "elu", "softplus", "identity"]
Count = Annotated[int, Field(ge=1)]


def check_groups(norm: str, groups: int, width: int) -> None:
    """Refuse groups of group normalization that do not divide the width."""
    if norm == "group" and width % groups:
        raise bad_value("groups", groups, f"a divisor of width, {width}")


def need_numbers(settings: Settings, inputs: InputShape) -> None:
    """Refuse token ids.

    Raises:
        InvalidInput: the inputs are token ids.
    """
    if inputs.vocabulary is not None:
        raise InvalidInput(
            f"model {settings.registered_name}: inputs are token ids; choose model transformer"
        )


def need_images(settings: Settings, inputs: InputShape) -> tuple[int, int, int]:
    """Channels, height and width of images.

    Raises:
        InvalidInput: the inputs are no images.
    """
    need_numbers(settings, inputs)
    if len(inputs.shape) != 3:
        raise InvalidInput(
            f"model {settings.registered_name}: inputs of shape {inputs.shape}, allowed: images "
            "(channels, height, width); choose model mlp"
        )
    channels, height, width = inputs.shape
    return channels, height, width
