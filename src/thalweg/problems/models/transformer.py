"""Settings of the Transformer encoder; its network is in `transformer_network.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from thalweg.errors import InvalidInput
from thalweg.problems.data.dataset import InputShape
from thalweg.problems.models.choices import Activation, Count
from thalweg.registry import models
from thalweg.settings import Settings, bad_value

if TYPE_CHECKING:
    from typing import Self

    from torch import nn


@models.register("transformer")
class Transformer(Settings):
    """Encoder for token ids: embedding, position, attention layers, the average, a linear output.

    Padding (id 0) is neither attended to nor averaged. `norm`: layer normalization before
    ("first") or after ("last", as in the original) each sublayer. `pooling`: the mean over tokens,
    or the output at a learned token put in front ("cls").
    """

    layers: Count = Field(default=2, description="attention layers")
    width: Count = Field(default=64, description="length of a token's vector")
    heads: Count = Field(default=8, description="attention heads; they divide the width")
    feed_forward: Count = Field(default=2048, description="width of the feed-forward sublayers")
    activation: Activation = Field(default="relu", description="in the feed-forward sublayers")
    norm: Literal["first", "last"] = Field(default="last", description="place of layer norm")
    position: Literal["learned", "sinusoidal", "none"] = Field(
        default="learned", description="encoding of a token's position"
    )
    pooling: Literal["mean", "cls"] = Field(default="mean", description="of tokens to one vector")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="fraction of values dropped while training"
    )

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.width % self.heads:
            raise bad_value("heads", self.heads, f"a divisor of width, {self.width}")
        return self

    def build(self, inputs: InputShape, outputs: int) -> nn.Module:
        if inputs.vocabulary is None:
            raise InvalidInput(
                f"model transformer: inputs of shape {inputs.shape} are numbers, not token ids; "
                "choose a data set of texts or another model"
            )
        from thalweg.problems.models.transformer_network import TokenClassifier

        length, vocabulary = inputs.shape[0], inputs.vocabulary
        return TokenClassifier(length, vocabulary, outputs, **self.model_dump())
