"""Which optimizers can a spec name?

Each has the option names and defaults of `torch.optim` (`sam` those of SGD, beside its own; `dion`
those of `thalweg.contrib.Dion`), except that the learning rate must be given. PyTorch is imported
when one is built, so that reading a spec stays fast.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, PrivateAttr, model_validator

from thalweg.errors import InvalidInput, invalid
from thalweg.registry import optimizers
from thalweg.settings import Choice, Settings, bad_value, registered, with_signature_of

if TYPE_CHECKING:
    from typing import Self

    from torch import Tensor
    from torch.optim import Optimizer

    Parameters = Iterable[Tensor] | Iterable[tuple[str, Tensor]]

BelowOne = Annotated[float, Field(ge=0, lt=1)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]

RELATIVE_LR = "relative_lr"
"""Key of a parameter group: its learning rate as a multiple of that of the settings, 1 if absent.

A schedule sets the settings' rate at each step; this keeps the ratio between groups.
"""

TransformerBlock = Literal[
    "norm", "position", "head", "embedding", "query_key", "value_output", "feed_forward"
]
"""A block of a Transformer, see `thalweg.operators.restricted`."""


class OptimizerSettings(Settings):
    """The settings of one optimizer."""

    torch_class: ClassVar[str]
    not_torchs: ClassVar[frozenset[str]] = frozenset()
    """Fields that the class of torch does not have."""

    lr: Positive = Field(description="learning rate, before the schedule")
    grad_power: Positive | None = Field(
        default=None,
        description="p: the optimizer sees sign(g) abs(g)^p in the place of each gradient g, after"
        " clipping (GradPower, Wang et al. 2025); g itself by default",
    )
    block_rates: dict[TransformerBlock, Positive] | None = Field(
        default=None,
        description="learning rates of the blocks of a Transformer, as multiples of lr at every"
        " step (Wang et al. 2025); 1 for a block that is not named",
    )

    def build(self, parameters: Parameters) -> Optimizer:
        """The optimizer over these tensors, or over pairs of name and tensor.

        Raises:
            InvalidInput: rates of blocks, and tensors without names or no Transformer's.
        """
        options = self.model_dump(exclude={"grad_power", "block_rates", *self.not_torchs})
        return self._with_grad_power(self.optimizer_class()(self._in_groups(parameters), **options))

    def _with_grad_power(self, optimizer: Optimizer) -> Optimizer:
        if self.grad_power is None:
            return optimizer
        from thalweg.contrib.grad_power import GradPower

        return GradPower(optimizer, self.grad_power)

    def _in_groups(self, parameters: Parameters) -> Any:
        """The parameters in a group for each rate, where blocks have rates of their own."""
        if self.block_rates is None:
            return parameters
        listed: list[Any] = list(parameters)
        if not all(isinstance(entry, tuple) for entry in listed):
            given = "tensors without names"
            raise invalid("parameters with block_rates", given, "pairs of name and tensor")
        from thalweg.contrib.blockwise import blockwise_groups

        return blockwise_groups(listed, self.lr, {**self.block_rates})

    @classmethod
    def optimizer_class(cls) -> type[Optimizer]:
        """What is built: the class of torch of the name `torch_class`."""
        import torch

        return getattr(torch.optim, cls.torch_class)


def fit(kind: str, name: str, given: object) -> type[Settings]:
    """The settings of an optimizer: of a class of settings, a class of torch's kind or a function.

    Its first parameter takes the parameters of the model, the others are settings, `lr` one of
    them.

    Raises:
        InvalidInput: it has no parameter lr, or one that no spec can write.
    """
    if not callable(given) or (isinstance(given, type) and issubclass(given, Settings)):
        return registered(kind, name, given)
    first, *others = inspect.signature(given).parameters
    if "lr" not in others:
        raise invalid(f"{kind} {name!r}: parameters", ", ".join(others), "lr among them")
    made = with_signature_of(given, OptimizerSettings, (first, "lr"), f"{kind} {name!r}")
    made.optimizer_class = classmethod(lambda cls: given)  # type: ignore[assignment]
    return registered(kind, name, made)


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


@optimizers.register("sam")
class SAMSettings(SGD):
    """Sharpness-aware minimization (Foret et al. 2021) around SGD: two gradients a step."""

    not_torchs = frozenset({"rho", "adaptive"})

    rho: NotNegative = Field(
        default=0.05, description="length of the perturbation at whose end the gradient is taken"
    )
    adaptive: bool = Field(
        default=False, description="scale the perturbation by the parameters (Kwon et al. 2021)"
    )

    def build(self, parameters: Parameters) -> Optimizer:
        """The optimizer over these tensors, or over pairs of name and tensor."""
        from thalweg import optim

        return optim.SAM(super().build(parameters), rho=self.rho, adaptive=self.adaptive)


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


@optimizers.register("given")
class GivenOptimizer(OptimizerSettings):
    """An optimizer that a Python function or class builds from the parameters."""

    listed: ClassVar[bool] = False

    source: str
    _made_by: Callable[[list[Tensor]], Optimizer] | None = PrivateAttr(default=None)

    def attach(self, made_by: Callable[[list[Tensor]], Optimizer]) -> None:
        """Give what the source stands for."""
        self._made_by = made_by

    def build(self, parameters: Parameters) -> Optimizer:
        """The optimizer over these tensors; its groups keep the ratios of their learning rates.

        Raises:
            InvalidInput: the function is not at hand.
        """
        if self._made_by is None:
            hint = "it was a Python object; call thalweg.lab.run with the same one"
            raise InvalidInput(f"optimizer {self.source}: it is not here; {hint}")
        if self.block_rates is not None:
            given = "block_rates with a Python object"
            raise invalid(
                f"optimizer {self.source}", given, "groups that the function makes itself"
            )
        optimizer = self._made_by([_tensor(entry) for entry in parameters])
        first = float(optimizer.param_groups[0]["lr"])
        for group in optimizer.param_groups:
            group[RELATIVE_LR] = float(group["lr"]) / first
            group["lr"] = self.lr * group[RELATIVE_LR]
        return self._with_grad_power(optimizer)


class MatrixSettings(OptimizerSettings):
    """An optimizer of matrices alone, with a companion for the other parameters."""

    not_torchs = frozenset({"companion"})

    companion: Annotated[OptimizerSettings, Choice(optimizers)] | None = Field(
        default=None,
        description="optimizer of the parameters that are no matrices (biases, norms), such as"
        " adamw with a learning rate of its own, which follows the same schedule",
    )

    @model_validator(mode="after")
    def _companion_takes_all_and_steps_alone(self) -> Self:
        if isinstance(self.companion, MatrixSettings | SAMSettings):
            given = self.companion.registered_name
            allowed = "an optimizer other than muon, dion and sam"
            raise bad_value("companion", given, allowed, "use adamw")
        return self

    def build(self, parameters: Parameters) -> Optimizer:
        """The optimizer over these tensors, or over pairs of name and tensor.

        Raises:
            InvalidInput: a tensor is not a matrix, and there is no companion; none is a matrix.
        """
        own = self.registered_name
        listed: list[Any] = list(parameters)
        matrices = [entry for entry in listed if _tensor(entry).ndim == 2]
        others = [entry for entry in listed if _tensor(entry).ndim != 2]
        if not others:
            return super().build(matrices)
        if self.companion is None:
            raise _not_a_matrix(own, listed)
        if not matrices:
            raise InvalidInput(f"optimizer {own}: no parameter is a matrix; use another optimizer")
        from thalweg.optim.combined import Combined

        companion = self.companion.build(others)
        for group in companion.param_groups:
            group[RELATIVE_LR] = self.companion.lr / self.lr * group.get(RELATIVE_LR, 1.0)
        return Combined([super().build(matrices), companion])


@optimizers.register("muon")
class Muon(MatrixSettings):
    """Muon (Jordan et al. 2024): momentum made orthogonal by Newton-Schulz steps; matrices only.

    All matrices, those of the output layer and of embeddings too, which common advice gives to
    another optimizer.
    """

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


@optimizers.register("dion")
class DionSettings(MatrixSettings):
    """Dion (Ahn et al. 2025): orthonormal updates of low rank with error feedback; matrices only.

    All matrices, as for `muon`.
    """

    torch_class = "Dion"

    mu: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.95, description="share of the applied part of the momentum that stays in it"
    )
    weight_decay: NotNegative = Field(
        default=0.01, description="decay of the weights at each step, times the learning rate"
    )
    rank_fraction: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0, description="rank of the updates over the smaller side of the matrix"
    )
    rank: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="rank of the updates itself, instead of the fraction"
    )
    transpose_wide: bool = Field(
        default=True, description="iterate on the transpose of matrices wider than high"
    )
    eps: Positive = Field(
        default=1e-8, description="added to the norm of a column that is divided by"
    )
    seed: Annotated[int, Field(ge=0)] = Field(
        default=0, description="of the random right factors at the start, the same in all runs"
    )

    @classmethod
    def optimizer_class(cls) -> type[Optimizer]:
        """What is built: Thalweg's own, torch has none."""
        from thalweg import contrib

        return contrib.Dion


def _not_a_matrix(own: str, entries: list[Any]) -> InvalidInput:
    """The error that names the first entry that is no matrix."""
    number, entry = next((n, e) for n, e in enumerate(entries) if _tensor(e).ndim != 2)
    name = entry[0] if isinstance(entry, tuple) else f"number {number}"
    return InvalidInput(
        f"optimizer {own}: parameter {name} has shape {tuple(_tensor(entry).shape)}, allowed:"
        " matrices (two dimensions); name a companion for the others, such as adamw, or use"
        " another optimizer"
    )


def _tensor(entry: Any) -> Tensor:
    """The tensor of an entry, which may be a pair of name and tensor."""
    return entry[1] if isinstance(entry, tuple) else entry
