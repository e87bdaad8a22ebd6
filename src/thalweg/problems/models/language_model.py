"""Settings of the decoder-only Transformer; its network is in `language_model_network.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from thalweg.errors import InvalidInput
from thalweg.problems.data.dataset import InputShape
from thalweg.problems.models.choices import Activation, Count
from thalweg.registry import models
from thalweg.settings import Settings, bad_value

if TYPE_CHECKING:
    from typing import Self

    from torch import nn


@models.register("language-model")
class LanguageModel(Settings):
    """Decoder-only Transformer: the scores of each next token, from the tokens up to it.

    Learned positions, layer norm before each sublayer, biases in all linear maps but the head.
    Parameters: token_embedding, position_embedding, layers.N.attention.query, .key, .value,
    .output, layers.N.attention_norm, layers.N.feed_forward, layers.N.feed_forward_norm, norm, head.
    """

    layers: Count = Field(default=2, description="attention layers")
    width: Count = Field(default=64, description="length of a token's vector")
    heads: Count = Field(default=4, description="attention heads; they divide the width")
    feed_forward: Count | None = Field(
        default=None, description="width of the feed-forward sublayers; 4 * width if not given"
    )
    activation: Activation = Field(default="gelu", description="in the feed-forward sublayers")
    tied_head: bool = Field(
        default=False, description="the head has the weights of the token embedding"
    )

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.width % self.heads:
            raise bad_value("heads", self.heads, f"a divisor of width, {self.width}")
        return self

    def build(self, inputs: InputShape, outputs: int) -> nn.Module:
        if inputs.vocabulary is None or outputs != inputs.vocabulary:
            tokens = "numbers" if inputs.vocabulary is None else f"{inputs.vocabulary} tokens"
            raise InvalidInput(
                f"model language-model: inputs are {tokens}, outputs {outputs} classes, allowed: a"
                " data set that predicts tokens from tokens; choose data set tinyshakespeare"
            )
        from thalweg.problems.models.language_model_network import Decoder

        return Decoder(inputs.shape[0], inputs.vocabulary, **self.model_dump())
