"""Which optimizers can a spec name?

Each has the option names and defaults of `torch.optim`, except that the learning rate must be
given. PyTorch is imported when one is built, so that reading a spec stays fast.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from thalweg.errors import InvalidInput
from thalweg.lab.registry import Registry, Settings, bad_value

if TYPE_CHECKING:
    from typing import Self

    from torch import Tensor
    from torch.optim import Optimizer

    Parameters = Iterable[Tensor] | Iterable[tuple[str, Tensor]]

BelowOne = Annotated[float, Field(ge=0, lt=1)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]


class OptimizerSettings(Settings):
    """The settings of one optimizer."""

    torch_class: ClassVar[str]

    lr: Positive = Field(description="learning rate, before the schedule")

    def build(self, parameters: Parameters) -> Optimizer:
        """The optimizer over these tensors, or over pairs of name and tensor."""
        import torch

        return getattr(torch.optim, self.torch_class)(parameters, **self.model_dump())


optimizers: Registry[OptimizerSettings] = Registry("optimizer")
"""Optimizers: a `torch.optim.Optimizer` for the parameters it is given."""


@optimizers.register("sgd")
class SGD(OptimizerSettings):
    """Stochastic gradient descent, with heavy-ball or Nesterov momentum."""

    torch_class = "SGD"

    momentum: BelowOne = Field(default=0.0, description="share of the old velocity that is kept")
    dampening: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.0, description="share of the new gradient that is left out of the velocity"
    )
    weight_decay: NotNegative = Field(default=0.0, description="L2 penalty, added to the gradient")
    nesterov: bool = Field(default=False, description="Nesterov's look-ahead instead of heavy ball")

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> Self:
        if self.nesterov and self.momentum == 0:
            raise bad_value("nesterov", True, "false when momentum is 0", "give a momentum")
        if self.nesterov and self.dampening != 0:
            raise bad_value("dampening", self.dampening, "0 with nesterov")
        return self


class AdamSettings(OptimizerSettings):
    """What Adam and AdamW share."""

    betas: tuple[BelowOne, BelowOne] = Field(
        default=(0.9, 0.999), description="averaging factors of the gradient and of its square"
    )
    eps: Positive = Field(default=1e-8, description="added to the root of the second moment")
    weight_decay: NotNegative = Field(default=0.0, description="L2 penalty, added to the gradient")
    amsgrad: bool = Field(default=False, description="use the largest second moment so far")


@optimizers.register("adam")
class Adam(AdamSettings):
    """Adam (Kingma, Ba 2015)."""

    torch_class = "Adam"


@optimizers.register("adamw")
class AdamW(AdamSettings):
    """Adam with decoupled weight decay (Loshchilov, Hutter 2019)."""

    torch_class = "AdamW"

    weight_decay: NotNegative = Field(
        default=0.01, description="decay of the weights at each step, times the learning rate"
    )


@optimizers.register("rmsprop")
class RMSprop(OptimizerSettings):
    """RMSprop (Hinton 2012): the gradient over the root of its averaged square."""

    torch_class = "RMSprop"

    alpha: BelowOne = Field(default=0.99, description="averaging factor of the squared gradient")
    eps: Positive = Field(default=1e-8, description="added to the root of the second moment")
    weight_decay: NotNegative = Field(default=0.0, description="L2 penalty, added to the gradient")
    momentum: BelowOne = Field(default=0.0, description="share of the old velocity that is kept")
    centered: bool = Field(default=False, description="divide by the standard deviation instead")


@optimizers.register("muon")
class Muon(OptimizerSettings):
    """Muon (Jordan et al. 2024): momentum made orthogonal by Newton-Schulz steps; matrices only."""

    torch_class = "Muon"

    weight_decay: NotNegative = Field(
        default=0.1, description="decay of the weights at each step, times the learning rate"
    )
    momentum: BelowOne = Field(default=0.95, description="averaging factor of the gradient")
    nesterov: bool = Field(default=True, description="look ahead along the momentum")
    ns_coefficients: tuple[float, float, float] = Field(
        default=(3.4445, -4.775, 2.0315), description="coefficients of the Newton-Schulz polynomial"
    )
    eps: Positive = Field(default=1e-7, description="least norm that a matrix is divided by")
    ns_steps: Annotated[int, Field(ge=1, lt=100)] = Field(
        default=5, description="Newton-Schulz steps"
    )
    adjust_lr_fn: Literal["original", "match_rms_adamw"] | None = Field(
        default=None, description="how the learning rate is scaled to a matrix's shape"
    )

    def build(self, parameters: Parameters) -> Optimizer:
        """The optimizer over these tensors, or over pairs of name and tensor.

        Raises:
            InvalidInput: a tensor is not a matrix; the message names it.
        """
        listed: list[Any] = list(parameters)
        for number, entry in enumerate(listed):
            name, tensor = entry if isinstance(entry, tuple) else (f"number {number}", entry)
            if tensor.ndim != 2:
                shape = tuple(tensor.shape)
                raise InvalidInput(
                    f"optimizer muon: parameter {name} has shape {shape}, allowed: matrices (two "
                    "dimensions); use a model without biases and norms, or another optimizer"
                )
        return super().build(listed)
