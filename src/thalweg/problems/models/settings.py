"""Which models can a spec name, and which of their choices?

The defaults are the paper's where they are known. Each builds its network from `networks/`, where
PyTorch is imported, with PyTorch's own initialization unless a setting says otherwise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from thalweg.errors import InvalidInput
from thalweg.problems.data.tensors import InputShape
from thalweg.registry import models
from thalweg.settings import Settings, bad_value

if TYPE_CHECKING:
    from typing import Self

    from torch import nn

Activation = Literal["tanh", "relu", "silu", "gelu", "elu", "softplus", "identity"]
Pooling = Literal["max", "avg", "none"]
Count = Annotated[int, Field(ge=1)]


@models.register("mlp")
class MLP(Settings):
    """Fully connected: flattened inputs, hidden layers with an activation, a linear output.

    The paper's, on MNIST: 784-200-200-10, tanh. Without hidden layers: a linear model.
    """

    hidden: tuple[Count, ...] = Field(default=(200, 200), description="widths of the hidden layers")
    activation: Activation = Field(default="tanh", description="after each hidden layer")
    bias: bool = Field(default=True, description="linear layers with a bias")

    def build(self, inputs: InputShape, outputs: int) -> nn.Module:
        _need_numbers(self, inputs)
        from thalweg.problems.models.mlp import mlp

        return mlp(inputs.size, self.hidden, outputs, self.activation, self.bias)


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
    pooling: Pooling = Field(default="max", description="2x2 after each convolution")
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
        channels, height, width = _need_images(self, inputs)
        from thalweg.problems.models.cnn import cnn

        return cnn(self, (channels, height, width), outputs)


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
        default=0.0, description="share of values dropped while training"
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
        from thalweg.problems.models.transformer import TokenClassifier

        return TokenClassifier(self, inputs.shape[0], inputs.vocabulary, outputs)


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
        from thalweg.problems.models.language_model import Decoder

        return Decoder(self, inputs.shape[0], inputs.vocabulary)


@models.register("vgg11")
class VGG11(Settings):
    """VGG-11 (Simonyan, Zisserman 2015, table 1, A) for images of 32x32 pixels or more.

    Eight convolutions of width w, 2w, 4w, 4w, 8w, 8w, 8w, 8w with five poolings, then linear
    layers; w = 64, two hidden ones of 512 and no dropout as in public code for CIFAR-10.
    `initialization`: "he" draws convolutions from N(0, 2 / (kernel area * output channels)), with
    zero bias, as that code does.
    """

    width: Count = Field(default=64, description="channels of the first convolution")
    norm: Literal["none", "group", "batch"] = Field(
        default="none", description="normalization after each convolution"
    )
    groups: Count = Field(default=8, description="groups of group normalization")
    pooling: Literal["max", "avg"] = Field(default="max", description="2x2, five times")
    activation: Activation = Field(default="relu", description="after each hidden layer")
    classifier: tuple[Count, ...] = Field(
        default=(512, 512), description="widths of the hidden linear layers"
    )
    initialization: Literal["default", "he"] = Field(
        default="default", description="of the convolutions; default: PyTorch's"
    )

    @model_validator(mode="after")
    def _groups_divide_width(self) -> Self:
        _check_groups(self.norm, self.groups, self.width)
        return self

    def build(self, inputs: InputShape, outputs: int) -> nn.Module:
        channels, height, width = _need_images(self, inputs)
        if min(height, width) < 32:
            raise InvalidInput(
                f"model vgg11: images of {height}x{width} pixels, its five poolings need at least "
                "32x32; choose model cnn or resnet8"
            )
        from thalweg.problems.models.vgg import vgg11

        return vgg11(self, (channels, height, width), outputs)


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
        _check_groups(self.norm, self.groups, self.width)
        return self

    def build(self, inputs: InputShape, outputs: int) -> nn.Module:
        channels, _, _ = _need_images(self, inputs)
        from thalweg.problems.models.resnet import ResNet

        return ResNet(self, channels, outputs)


def _check_groups(norm: str, groups: int, width: int) -> None:
    if norm == "group" and width % groups:
        raise bad_value("groups", groups, f"a divisor of width, {width}")


def _need_numbers(settings: Settings, inputs: InputShape) -> None:
    if inputs.vocabulary is not None:
        raise InvalidInput(
            f"model {settings.registered_name}: inputs are token ids; choose model transformer"
        )


def _need_images(settings: Settings, inputs: InputShape) -> tuple[int, int, int]:
    _need_numbers(settings, inputs)
    if len(inputs.shape) != 3:
        raise InvalidInput(
            f"model {settings.registered_name}: inputs of shape {inputs.shape}, allowed: images "
            "(channels, height, width); choose model mlp"
        )
    channels, height, width = inputs.shape
    return channels, height, width
