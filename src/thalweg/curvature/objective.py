"""A model, a loss and data as one deterministic function of a flat parameter vector.

L(theta) = sum_c w_c loss(chunk c; theta) / sum_c w_c, where w_c is the number of samples in the
chunk, or whatever weight the loss averages over (tokens, class weights). Value, gradient and
products with the Hessian are the same for every chunk size, up to rounding.

Example:
    >>> import torch
    >>> model, data = torch.nn.Linear(3, 2), (torch.randn(8, 3), torch.randn(8, 2))
    >>> objective = Objective(model, torch.nn.MSELoss(), data)
    >>> objective
    Objective(P=8, N=8, chunk_size=1024)
    >>> objective.gradient().shape
    torch.Size([8])
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from thalweg.curvature.determinism import (
    mode_dependent_layers,
    no_random_numbers,
    refuse_unfit_layers,
)
from thalweg.curvature.layout import ParameterLayout
from thalweg.curvature.products import BlockProducts, Linearization
from thalweg.curvature.samples import Batch, Samples, as_samples
from thalweg.curvature.weighting import batch_weight_of, is_torch_loss, target_name
from thalweg.errors import Diverged, InvalidInput, invalid


class Objective:
    """The loss of a model over a fixed data set, as a function of theta (P,).

    Args:
        model: any module. It is never changed: buffers, gradients and random state stay as they
            are.
        loss: `loss(output, target) -> scalar`, the mean over the batch; or None for a model that
            returns the loss itself or an object with a `.loss`.
        data: a tuple `(inputs..., target)` or dict of tensors, a `Dataset`, a `DataLoader`, or a
            list of batches. Dict batches are passed to the model as keywords; a loss of torch then
            gets the entry 'labels' or 'target', and the model the others; a loss of your own gets
            `loss(output, batch)`.
        parameters: shell patterns of the names that make up theta; None for all that require a
            gradient.
        batch_weight: `batch_weight(batch) -> weight` of a batch in the mean, where the loss does
            not average over samples: `lambda b: (b["labels"] != -100).sum()` for tokens. Known by
            itself for `nn.CrossEntropyLoss` and `nn.NLLLoss` with class weights, ignored targets,
            or several targets a sample.
        chunk_size: the most samples evaluated at once; bounds memory, changes only the rounding.
        mode: "eval" evaluates with dropout off and batch norm at its running statistics; None
            takes the model as it is and refuses such layers in training mode, since they make the
            loss random or dependent on the chunk.
        vectorize_up_to: samples in the largest chunk whose block of products is one vectorized
            backward pass, 0 for none; None measures. See `products.py`.

    Raises:
        InvalidInput: a dropout or batch-norm layer in training mode, here or when the loss is
            evaluated; empty data, no trainable parameter, an impossible chunk size.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], Tensor] | None,
        data: object,
        *,
        parameters: Sequence[str] | str | None = None,
        batch_weight: Callable[[Batch], Tensor | float] | None = None,
        chunk_size: int | None = 1024,
        mode: Literal["eval"] | None = None,
        vectorize_up_to: int | None = None,
    ) -> None:
        if chunk_size is not None and chunk_size < 1:
            raise invalid("chunk_size", chunk_size, "an integer >= 1, or None for no limit")
        if mode not in (None, "eval"):
            raise invalid("mode", mode, "None or 'eval'")
        self.model = model
        self.samples: Samples = as_samples(data)
        self.layout = ParameterLayout.from_model(model, parameters)
        self.chunk_size = chunk_size
        self.mode = mode
        self.products = BlockProducts(vectorize_up_to)
        self.batch_weight = batch_weight or batch_weight_of(loss)
        self._loss_of_batch = _LossOfBatch(model, loss)
        self._state_names = tuple("model." + name for name in self.layout.names)
        self._unused: set[str] = set()
        self._total_weight: float | None = None
        self._mode_dependent = mode_dependent_layers(model)
        refuse_unfit_layers(self._mode_dependent, mode)

    @property
    def num_parameters(self) -> int:
        """P, the length of theta."""
        return self.layout.num_parameters

    @property
    def num_samples(self) -> int:
        """N, the number of samples."""
        return len(self.samples)

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return self.layout.parameters(self.model)[0].device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return self.layout.parameters(self.model)[0].dtype

    def theta(self) -> Tensor:
        """A copy of the model's current parameters, (P,)."""
        return self.layout.read(self.model)

    def value(self, theta: Tensor | None = None, samples: Tensor | None = None) -> Tensor:
        """The mean loss, a scalar tensor.

        Args:
            theta: the point (P,); None for the model's current parameters.
            samples: indices of the samples to average over, int64 (n,); None for all.

        Raises:
            Diverged: the loss is NaN or infinite.
        """
        leaves = self._leaves(theta, requires_grad=False)
        total = torch.zeros((), device=self.device)
        with self._evaluation(), torch.no_grad():
            for batch, _, share in self._chunks(samples):
                total = total + share * self._loss(leaves, batch)
        return _finite(total, "loss")

    def gradient(self, theta: Tensor | None = None, samples: Tensor | None = None) -> Tensor:
        """The gradient of the mean loss, (P,). See `value` for arguments and errors."""
        return self.value_and_gradient(theta, samples)[1]

    def weight(self, samples: Tensor | None = None) -> float:
        """How much samples count in the mean: their number, or the sum of their batch weights.

        The mean over a union of disjoint sets is that of their means, with these weights.
        """
        if self.batch_weight is None:
            return float(self.num_samples if samples is None else len(samples))
        if samples is None and self._total_weight is not None:
            return self._total_weight
        chunks = self.samples.chunks(samples, self.chunk_size)
        total = sum(float(self.batch_weight(batch)) for batch, _ in chunks)
        if not total > 0:
            raise invalid("batch_weight", total, "a positive sum over all batches")
        if samples is None:
            self._total_weight = total
        return total

    def value_and_gradient(
        self, theta: Tensor | None = None, samples: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Loss and gradient (P,) from one pass. See `value` for arguments and errors."""
        total = torch.zeros((), device=self.device)
        gradient = torch.zeros(self.num_parameters, dtype=self.dtype, device=self.device)
        with self._evaluation():
            for batch, _, share in self._chunks(samples):
                leaves = self._leaves(theta, requires_grad=True)
                value = self._loss(leaves, batch)
                parts = _derivatives(value, leaves, create_graph=False)
                gradient += share * self.layout.flatten(self._filled(parts, leaves))
                total = total + share * value.detach()
        return _finite(total, "loss"), _finite(gradient, "gradient")

    def linearizations(
        self, theta: Tensor | None = None, samples: Tensor | None = None
    ) -> Iterator[Linearization]:
        """Yield the gradient of each chunk with its graph; drop it to free the chunk's memory.

        Consume with products inside the loop: see `Hessian`.
        """
        for batch, count, share in self._chunks(samples):
            with self._evaluation():
                leaves = self._leaves(theta, requires_grad=True)
                value = self._loss(leaves, batch)
                _finite(value.detach(), "loss")
                parts = _derivatives(value, leaves, create_graph=True)
            yield Linearization(share, count, leaves, self._filled(parts, leaves))

    def multiply(self, linearization: Linearization, rows: Tensor) -> Tensor:
        """H of one chunk times each row of (k, P), returned as rows (k, P), not weighted.

        Raises:
            InvalidInput: `vectorize_up_to` was given, and a layer has no vectorized derivative.
        """
        return self.products.multiply(self.layout, linearization, rows)

    def _leaves(self, theta: Tensor | None, *, requires_grad: bool) -> tuple[Tensor, ...]:
        """Fresh leaves, so that no graph is shared between calls or with the user's own."""
        if theta is None:
            parts = [p.detach() for p in self.layout.parameters(self.model)]
        else:
            parts = [part.detach() for part in self.layout.unflatten(theta)]
        return tuple(part.requires_grad_(requires_grad) for part in parts)

    def _loss(self, leaves: Sequence[Tensor], batch: Batch) -> Tensor:
        state = dict(zip(self._state_names, leaves, strict=True))
        # Copies: a layer that updates its buffers in place must not touch the user's.
        for name, buffer in self.model.named_buffers():
            state["model." + name] = buffer.clone()
        with no_random_numbers(self.device):
            value = functional_call(self._loss_of_batch, state, (batch,))
        if not isinstance(value, Tensor) or value.numel() != 1:
            given = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise invalid("loss", given, "a scalar tensor", "average over the batch")
        return value.reshape(())

    def _chunks(self, samples: Tensor | None) -> Iterator[tuple[Batch, int, float]]:
        """Each chunk, its number of samples, and its weight in the mean."""
        if samples is not None:
            self._refuse_unfit_indices(samples)
        # Where batches are weighed, the data is read twice rather than held in memory.
        total = self.weight(samples)
        for batch, count in self.samples.chunks(samples, self.chunk_size):
            weight = count if self.batch_weight is None else float(self.batch_weight(batch))
            # A chunk in which every target is ignored has the mean 0/0.
            if weight:
                yield batch, count, weight / total

    def _refuse_unfit_indices(self, samples: Tensor) -> None:
        allowed = f"int64 (n,), n >= 1, each from 0 to {self.num_samples - 1}"
        if samples.dtype != torch.int64 or samples.dim() != 1 or len(samples) == 0:
            raise invalid("samples", f"{samples.dtype} {tuple(samples.shape)}", allowed)
        low, high = int(samples.min()), int(samples.max())
        if low < 0 or high >= self.num_samples:
            raise invalid("samples", low if low < 0 else high, allowed)

    def _filled(
        self, parts: Sequence[Tensor | None], leaves: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        for name, part in zip(self.layout.names, parts, strict=True):
            if part is None and name not in self._unused:
                self._unused.add(name)
                warnings.warn(
                    f"the loss does not use parameter {name!r}: its part of every gradient and"
                    " product is zero",
                    stacklevel=4,
                )
        return tuple(
            torch.zeros_like(leaf) if part is None else part
            for part, leaf in zip(parts, leaves, strict=True)
        )

    @contextmanager
    def _evaluation(self) -> Iterator[None]:
        """Attention that can be differentiated twice, autograd on, and the mode asked for."""
        # At every evaluation: a model built in evaluation mode is switched when it is trained.
        refuse_unfit_layers(self._mode_dependent, self.mode)
        training = [m for m in self.model.modules() if m.training] if self.mode == "eval" else []
        for module in training:
            module.training = False
        try:
            # Fused attention kernels have no second derivative.
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
                yield
        finally:
            for module in training:
                module.training = True

    def __repr__(self) -> str:
        return (
            f"Objective(P={self.num_parameters}, N={self.num_samples},"
            f" chunk_size={self.chunk_size})"
        )


class _LossOfBatch(nn.Module):
    """The loss as a function of one batch, so that parameters can be swapped under it."""

    def __init__(self, model: nn.Module, loss: Callable[[Any, Any], Tensor] | None) -> None:
        super().__init__()
        self.model = model
        # Kept out of the module tree: a loss with buffers of its own is a constant.
        self._loss = [loss]

    def forward(self, batch: Batch) -> Tensor:
        loss = self._loss[0]
        if isinstance(batch, Mapping):
            if loss is not None and is_torch_loss(loss):
                target = target_name(batch)
                inputs = {name: value for name, value in batch.items() if name != target}
                return loss(self.model(**inputs), batch[target])
            output = self.model(**batch)
            if loss is not None:
                return loss(output, batch)
        elif loss is not None:
            *inputs, target = batch
            return loss(self.model(*inputs), target)
        else:
            output = self.model(*batch)
        found = output["loss"] if isinstance(output, Mapping) else getattr(output, "loss", output)
        if not isinstance(found, Tensor):
            raise invalid("model output", type(output).__name__, "a scalar or an object with .loss")
        return found


def _derivatives(
    value: Tensor, leaves: Sequence[Tensor], *, create_graph: bool
) -> tuple[Tensor | None, ...]:
    if not value.requires_grad:
        raise InvalidInput(
            "loss: it does not depend on any parameter; was an output detached, or computed under"
            " no_grad?"
        )
    return torch.autograd.grad(value, leaves, create_graph=create_graph, allow_unused=True)


def _finite(tensor: Tensor, what: str) -> Tensor:
    # One sum, since it is NaN or infinite if an element is: `isfinite` takes 25 times as long.
    if not bool(torch.isfinite(tensor.sum())):
        raise Diverged(f"the {what} is NaN or infinite")
    return tensor
