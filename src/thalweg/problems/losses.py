"""Losses: a mean over samples, every factor written out.

Sharpness and learning rates scale with the convention (mean or sum over outputs, with or without
the half), so it is a setting with a name. The squares are written out because forward-mode
derivatives do not go through `nn.MSELoss`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from thalweg.errors import InvalidInput
from thalweg.registry import losses
from thalweg.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

Target = Literal["one-hot", "class"]
"""What a loss compares the output with: a vector of numbers, or the number of the class."""


@dataclass(frozen=True)
class SquaredError:
    """L = factor / n * sum over samples and outputs of (output - target)^2."""

    factor: float

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss of outputs (n, ...) against targets of the same shape, a scalar.

        Raises:
            InvalidInput: the shapes differ.
        """
        if output.shape != target.shape:
            raise InvalidInput(
                f"loss mse: output of shape {tuple(output.shape)}, target of "
                f"{tuple(target.shape)}; they must agree"
            )
        return self.factor * (output - target).square().flatten(1).sum(dim=1).mean()


@dataclass(frozen=True)
class CrossEntropy:
    """L = - 1/n * sum over samples of log softmax(output)[class].

    Of sequences each sample is the mean over its tokens.
    """

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss, a scalar.

        Args:
            output: (n, classes), or (n, length, classes) of sequences.
            target: class numbers int64, (n,) or (n, length).

        Raises:
            InvalidInput: there is not one target for each row of outputs.
        """
        from torch.nn.functional import cross_entropy

        if target.is_floating_point() or output.shape[:-1] != target.shape:
            raise InvalidInput(
                f"loss cross-entropy: output of shape {tuple(output.shape)}, target of "
                f"{tuple(target.shape)}; each row of outputs needs one class"
            )
        # All sequences are of one length: the mean of their means is that over all tokens.
        return cross_entropy(output.flatten(0, -2), target.flatten())


@dataclass(frozen=True)
class MeanOutput:
    """L = 1/n * sum over samples of the output: the model's output is the loss itself."""

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        """The mean of outputs (n,) or (n, 1), a scalar; the target is not used.

        Raises:
            InvalidInput: more than one number a sample.
        """
        if output.dim() != 1 and output.shape[1:].numel() != 1:
            raise InvalidInput(
                f"loss output: output of shape {tuple(output.shape)}, allowed: one number a "
                "sample; take loss mse, or a model whose output is its loss"
            )
        return output.mean()


@losses.register("mse")
class MeanSquaredError(Settings):
    """Squared error, summed over outputs, averaged over samples; classes are one-hot, 0 and 1.

    factor = 0.5 is the paper's loss; 1 leaves the half out.
    """

    target: ClassVar[Target] = "one-hot"

    factor: Annotated[float, Field(gt=0)] = Field(
        default=0.5, description="factor before the sum of squares"
    )

    def build(self) -> SquaredError:
        return SquaredError(self.factor)


@losses.register("cross-entropy")
class MeanCrossEntropy(Settings):
    """Cross-entropy with the softmax of the outputs, in nats, averaged over samples and tokens."""

    target: ClassVar[Target] = "class"

    def build(self) -> CrossEntropy:
        return CrossEntropy()


@losses.register("output")
class Output(Settings):
    """The model's output, one number a sample, averaged over samples: for models that are losses.

    The toys `valley` and `quadratic` are such models.
    """

    target: ClassVar[Target] = "one-hot"

    def build(self) -> MeanOutput:
        return MeanOutput()
