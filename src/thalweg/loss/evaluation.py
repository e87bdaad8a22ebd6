"""A model and its loss on one batch, with the graph from the parameters to outputs and loss."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from thalweg.errors import InvalidInput, invalid
from thalweg.loss.batches import PerSample, mapped_leaves
from thalweg.loss.guards.determinism import (
    mode_dependent_layers,
    no_random_numbers,
    refuse_unfit_layers,
)
from thalweg.loss.guards.memory import is_out_of_memory
from thalweg.loss.guards.precision import full_precision, has_recurrent_layers, twice_differentiable
from thalweg.loss.layout import ParameterLayout
from thalweg.loss.outputs import separated, tensors_of
from thalweg.loss.samples import Batch
from thalweg.loss.weighting import is_torch_loss, target_name


class Evaluation(NamedTuple):
    """One chunk of samples, evaluated.

    Attributes:
        fraction: the weight of the chunk in the mean over all that was asked for.
        samples: how many samples the chunk has.
        leaves: the parameters, leaves of the graph.
        outputs: the model's outputs that depend on the parameters, see `outputs.py`. Empty where
            the model returns nothing but its loss.
        loss: the mean loss of the chunk, a scalar.
    """

    fraction: float
    samples: int
    leaves: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    loss: Tensor


class Evaluator:
    """A model and its loss on single batches, at any parameters, without a trace in the model.

    Args:
        model, loss, mode, forward_dtype: as for `Objective`.
        layout: which of the model's parameters make up theta.

    Raises:
        InvalidInput: another mode or dtype; dropout or batch norm in training mode.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], Tensor] | None,
        layout: ParameterLayout,
        mode: str | None,
        forward_dtype: torch.dtype | None,
    ) -> None:
        if mode not in (None, "eval"):
            raise invalid("mode", mode, "None or 'eval'")
        if forward_dtype not in (None, torch.bfloat16, torch.float16):
            raise invalid("forward_dtype", forward_dtype, "None, torch.bfloat16 or torch.float16")
        self.model = model
        self.loss = loss
        self.layout = layout
        self.mode = mode
        self.forward_dtype = forward_dtype
        self._loss_of_batch = LossOfBatch(model, loss)
        self._state_names = tuple("model." + name for name in layout.names)
        self._unused: set[str] = set()
        self._mode_dependent = mode_dependent_layers(model)
        self._recurrent = has_recurrent_layers(model)
        refuse_unfit_layers(self._mode_dependent, mode)

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return self.layout.parameters(self.model)[0].device

    @contextmanager
    def settings(self) -> Iterator[None]:
        """Layers that can be differentiated twice, autograd on, precision and mode as asked for."""
        # At every evaluation: a model built in evaluation mode is switched when it is trained.
        refuse_unfit_layers(self._mode_dependent, self.mode)
        training = [m for m in self.model.modules() if m.training] if self.mode == "eval" else []
        for module in training:
            module.training = False
        try:
            # Fused attention kernels have no second derivative.
            with (
                torch.enable_grad(),
                sdpa_kernel(SDPBackend.MATH),
                full_precision(),
                twice_differentiable(self._recurrent),
                torch.autocast(
                    self.device.type, self.forward_dtype, enabled=self.forward_dtype is not None
                ),
            ):
                yield
        finally:
            for module in training:
                module.training = True

    def leaves(self, theta: Tensor | None, *, requires_grad: bool) -> tuple[Tensor, ...]:
        """Parameters at theta (P,), or as they are: leaves of a graph that nothing else shares."""
        if theta is None:
            parts = [p.detach() for p in self.layout.parameters(self.model)]
        else:
            parts = [part.detach() for part in self.layout.unflatten(theta)]
        return tuple(part.requires_grad_(requires_grad) for part in parts)

    def outputs_and_loss(
        self, leaves: Sequence[Tensor], batch: Batch
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """What the model gives for a batch, and the loss, a scalar; inside `settings`.

        Raises:
            InvalidInput: the loss is no scalar, or draws random numbers.
        """
        state = dict(zip(self._state_names, leaves, strict=True))
        # Copies: a layer that updates its buffers in place must not touch the user's.
        for name, buffer in self.model.named_buffers():
            state["model." + name] = buffer.clone()
        with no_random_numbers(self.device):
            outputs, loss = functional_call(self._loss_of_batch, state, (batch,))
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            given = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise invalid("loss", given, "a scalar tensor", "average over the batch")
        return outputs, loss.reshape(())

    def losses_of_each(self, leaves: Sequence[Tensor], parts: Batch, count: int) -> Tensor:
        """The losses (n,) of batches stacked along the first dimension; inside `settings`."""

        def loss(part: Batch) -> Tensor:
            return self.outputs_and_loss(leaves, part)[1]

        return mapped(loss, count, parts)

    def gradient(
        self, evaluation: Evaluation, *, create_graph: bool = False, retain_graph: bool = False
    ) -> tuple[Tensor, ...]:
        """The gradient of a batch's mean loss: see `Objective.gradient_of`."""
        loss, leaves = evaluation.loss, evaluation.leaves
        refuse_constant(loss)
        with full_precision():
            parts = torch.autograd.grad(
                loss,
                leaves,
                create_graph=create_graph,
                retain_graph=create_graph or retain_graph,
                allow_unused=True,
            )
        return self._filled(parts, leaves)

    def _filled(
        self, parts: Sequence[Tensor | None], leaves: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        for name, part in zip(self.layout.names, parts, strict=True):
            if part is None and name not in self._unused:
                self._unused.add(name)
                warnings.warn(
                    f"the loss does not use parameter {name!r}: its part of every gradient and"
                    " product is zero",
                    stacklevel=8,
                )
        return tuple(
            torch.zeros_like(leaf) if part is None else part
            for part, leaf in zip(parts, leaves, strict=True)
        )


class LossOfBatch(nn.Module):
    """Outputs and loss as a function of one batch, so that parameters can be swapped under it."""

    def __init__(self, model: nn.Module, loss: Callable[[Any, Any], Tensor] | None) -> None:
        super().__init__()
        self.model = model
        # Kept out of the module tree: a loss with buffers of its own is a constant.
        self._loss = [loss]

    def forward(self, batch: Batch) -> tuple[tuple[Tensor, ...], Tensor]:
        """Outputs that depend on the parameters, and the loss."""
        output, loss = self._output_and_loss(batch)
        outputs = (z for z in tensors_of(output) if z.requires_grad and z is not loss)
        return tuple(outputs), loss

    def _output_and_loss(self, batch: Batch) -> tuple[Any, Tensor]:
        loss = self._loss[0]
        if not isinstance(batch, Mapping):
            *inputs, target = batch if loss is not None else (*batch, None)
            output = self._separated(self.model(*inputs))
            return output, _own_loss(output) if loss is None else loss(output, target)
        if loss is not None and is_torch_loss(loss):
            target = target_name(batch)
            inputs = {name: value for name, value in batch.items() if name != target}
            output = self._separated(self.model(**inputs))
            return output, loss(output, batch[target])
        output = self._separated(self.model(**batch))
        return output, _own_loss(output) if loss is None else loss(output, batch)

    def _separated(self, output: Any) -> Any:
        """What the loss gets; a model that returns its own loss has read its outputs already."""
        return output if self._loss[0] is None else separated(output)


def _own_loss(output: Any) -> Tensor:
    """The loss that a model returns: a scalar, or an entry or attribute `loss`."""
    found = output["loss"] if isinstance(output, Mapping) else getattr(output, "loss", output)
    if not isinstance(found, Tensor):
        raise invalid("model output", type(output).__name__, "a scalar or an object with .loss")
    return found


def refuse_constant(loss: Tensor) -> None:
    """Raise where a loss cannot be differentiated.

    Raises:
        InvalidInput: it does not depend on any parameter.
    """
    if not loss.requires_grad:
        raise InvalidInput(
            "loss: it does not depend on any parameter; was an output detached, or computed"
            " under no_grad?"
        )


def mapped(function: Callable[..., Tensor], count: int, *stacked: Batch) -> Tensor:
    """A function of tensors, applied to each of `count` entries of stacked ones; stacked (count,).

    At once by `torch.vmap`; one by one where a layer does not have it.
    """
    leaves, structure = tree_flatten(stacked)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def of_tensors(*tensors: Tensor) -> Tensor:
        parts = list(leaves)
        for i, tensor in zip(places, tensors, strict=True):
            parts[i] = tensor
        return function(*tree_unflatten(parts, structure))

    if not any(isinstance(leaf, PerSample) for leaf in leaves):
        try:
            return torch.vmap(of_tensors)(*(leaves[i] for i in places))
        except (RuntimeError, NotImplementedError, ValueError) as error:
            if is_out_of_memory(error):
                raise
    return torch.stack([function(*(entries(s, i) for s in stacked)) for i in range(count)])


def entries(batch: Batch, chosen: int | Tensor) -> Batch:
    """Some entries of batches that are stacked along the first dimension."""

    def of_list(values: PerSample) -> Any:
        if isinstance(chosen, int):
            return values[chosen]
        some = torch.arange(len(values))[chosen.cpu()].tolist()
        return PerSample(values[i] for i in some)

    return tree_map(mapped_leaves(lambda tensor: tensor[chosen], of_list), batch)


def in_groups(batch: Batch, size: int) -> Batch:
    """A batch as stacked batches of so many samples each."""

    def of_list(values: PerSample) -> PerSample:
        starts = range(0, len(values), size)
        return PerSample(PerSample(values[i : i + size]) for i in starts)

    unflatten = mapped_leaves(lambda tensor: tensor.unflatten(0, (-1, size)), of_list)
    return tree_map(unflatten, batch)
