"""Base of the operators of a loss: a sum over chunks of samples, multiplied with `@`."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Self

import torch
from torch import Tensor

from thalweg.errors import Diverged, invalid
from thalweg.loss.evaluation import Evaluation
from thalweg.loss.guards.finiteness import all_finite
from thalweg.loss.guards.memory import within_memory
from thalweg.loss.multiplication import Linearization
from thalweg.loss.objective import Objective
from thalweg.operators.symmetric import OperatorAround, SymmetricOperator, rows_of

FEWEST = 32
"""Samples that say something about all of them."""


class LossOperator(ABC):
    """A curvature of the mean loss at theta, over all samples or some; the sum of its chunks.

    Args:
        objective: the loss.
        theta: the point (P,); None for the model's parameters as they are now (copied).
        samples: indices of the samples to average over, int64 (n,); None for all.
        keep_graph: keep the graphs of all chunks between products: right for many products one
            after another (an eigensolver), at the price of holding them in memory.

    Attributes:
        products: how many vectors were multiplied.

    Raises:
        InvalidInput: theta has another length than P, or is on another device than the model.
    """

    def __init__(
        self,
        objective: Objective,
        theta: Tensor | None = None,
        samples: Tensor | None = None,
        *,
        keep_graph: bool = False,
    ) -> None:
        self.objective = objective
        self.theta = objective.theta() if theta is None else theta
        if self.theta.shape != (objective.num_parameters,):
            raise invalid("theta", tuple(self.theta.shape), f"({objective.num_parameters},)")
        if self.theta.device != objective.device:
            raise invalid(
                "theta", f"on {self.theta.device}", f"on {objective.device}, like the model"
            )
        self.samples = samples
        self.keep_graph = keep_graph
        self.products = 0
        self._gradient: Tensor | None = None
        self._kept: list[Linearization] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(P, P)."""
        return self.objective.num_parameters, self.objective.num_parameters

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return self.theta.dtype

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.theta.device

    @property
    def gradient(self) -> Tensor:
        """The gradient over the operator's samples at theta (P,), in units of the loss over theta.

        Every product finds it on the way. Before the first one this is a pass of its own, whose
        graphs serve the products that follow where `keep_graph` says so.

        Raises:
            Diverged: the loss or the gradient is NaN or infinite.
        """
        if self._gradient is None:
            within_memory(self.objective, lambda: self._pass(None))
        assert self._gradient is not None
        if not all_finite(self._gradient):
            raise Diverged("the gradient is NaN or infinite")
        return self._gradient

    @abstractmethod
    def linearize(self, evaluation: Evaluation) -> Linearization:
        """The graph of one chunk that the operator's products go through."""

    def evaluations(self) -> Iterator[Evaluation]:
        """Each chunk, evaluated at theta."""
        return self.objective.evaluations(self.theta, self.samples)

    def linearizations(self) -> Iterator[Linearization]:
        """The graph of each chunk; drop one before the next to free its memory."""
        return map(self.linearize, self.evaluations())

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """A v for (P,), or A V for the columns of (P, k), stored column by column.

        Raises:
            InvalidInput: the first dimension is not P, or another device than the model's.
            Diverged: the loss or the product is NaN or infinite.
        """
        rows = rows_of(vectors, self)
        result = within_memory(self.objective, lambda: self._pass(rows))
        assert result is not None
        self.products += rows.shape[0]
        if not all_finite(result):
            name = type(self).__name__
            raise Diverged(f"a product with the {name} is NaN or infinite")
        return result[0] if vectors.dim() == 1 else result.T

    def thinned(self, share: float, generator: torch.Generator) -> Self | None:
        """The same operator over a random part of its samples: see `thinned`."""
        objective = self.objective
        samples = torch.arange(objective.num_samples) if self.samples is None else self.samples
        count = math.ceil(share * len(samples))
        if count < FEWEST:
            return None
        few = copy.copy(self)
        few.samples = samples[torch.randperm(len(samples), generator=generator)[:count]]
        few.products, few._gradient, few._kept = 0, None, None
        return few

    def _pass(self, rows: Tensor | None) -> Tensor | None:
        """A times each row of (k, P), as rows; None for None, which leaves the gradient known."""
        objective = self.objective
        shaped = None if rows is None else objective.layout.unflatten(rows)
        result: Tensor | None = None
        gradient = None if self._gradient is not None else torch.zeros_like(self.theta)
        chunks = self._kept or self.linearizations()
        # Given up until all is done: where memory runs out, what is kept must not stay.
        self._kept, kept = None, []
        for chunk in chunks:
            if shaped is not None:
                part = objective.products.multiply(chunk, shaped)
                # In place: on small chunks the passes over (k, P) cost more than the arithmetic.
                if chunk.share != 1:
                    part.mul_(chunk.share)
                result = part if result is None else result.add_(part)
            if gradient is not None:
                parts = [g.detach() for g in chunk.gradient]
                gradient.add_(objective.layout.flatten(parts), alpha=chunk.share)
            if self.keep_graph:
                kept.append(chunk)
        self._kept = kept or None
        if gradient is not None:
            self._gradient = gradient
        return result


def thinned(
    operator: SymmetricOperator, share: float, generator: torch.Generator
) -> SymmetricOperator | None:
    """The same operator over a random share of its samples: what costs that share of a product.

    None for one that is not made of samples, or where they would be fewer than `FEWEST`.
    """
    if isinstance(operator, OperatorAround):
        inside = thinned(operator.operator, share, generator)
        if inside is None:
            return None
        around = copy.copy(operator)
        around.operator = inside
        return around
    return operator.thinned(share, generator) if isinstance(operator, LossOperator) else None
