"""Base of the operators of a loss: a curvature at theta, multiplied with `@`."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch import Tensor

from thalweg.errors import InvalidInput, invalid
from thalweg.linalg import length, require_finite
from thalweg.loss.chunk_multiplier import ChunkGraph
from thalweg.loss.evaluation import Evaluation
from thalweg.loss.linearization import ChunkedLinearization
from thalweg.loss.objective import Objective, require_objective
from thalweg.loss.protocol import Linearization, Loss, multiplied
from thalweg.operators.product_check import check_once
from thalweg.operators.symmetric import CountsMatvecs, OperatorAround, SymmetricOperator, rows_of
from thalweg.sharding import Sharding, sharding_of
from thalweg.surroundings import shielded

FEWEST = 32
"""Targets that say something about all of them: samples, or the tokens of a few sequences."""


class LossOperator(CountsMatvecs, ABC):
    """A curvature of the mean loss at theta, over all samples or some.

    Args:
        objective: the loss.
        theta: the point (P,); None for the parameters as they are now (copied).
        samples: indices of the samples to average over, int64 (n,); None for all.
        keep_graph: keep the graphs of all chunks between products: right for many products one
            after another (an eigensolver), at the price of holding them in memory.

    Attributes:
        num_matvecs: how many vectors were multiplied.

    Before the first product of a class of operators of a loss, one product is compared with
    differences of gradients, see `product_check.py`, unless the loss has `check = False`.

    Raises:
        InvalidInput: theta has another length than P, or is on another device than the loss; at the
            first product: the products are not those of the first derivatives.
    """

    def __init__(
        self,
        objective: Loss,
        theta: Tensor | None = None,
        samples: Tensor | None = None,
        *,
        keep_graph: bool = False,
    ) -> None:
        self.objective = objective
        self.theta = objective.theta() if theta is None else theta
        if self.theta.dim() != 1 or length(self.theta) != objective.num_parameters:
            raise invalid("theta", tuple(self.theta.shape), f"({objective.num_parameters},)")
        if self.theta.device != objective.device:
            raise invalid(
                "theta", f"on {self.theta.device}", f"on {objective.device}, like the model"
            )
        self.samples = samples
        self.keep_graph = keep_graph
        self.num_matvecs = 0
        self._linearization: Linearization | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the graphs, which cannot be copied: a copy builds them when it multiplies."""
        return {**vars(self), "_linearization": None}

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
    def sharding(self) -> Sharding | None:
        """Of theta, and of the vectors it multiplies; None where they are whole."""
        return sharding_of(self.theta)

    @property
    @shielded()
    def gradient(self) -> Tensor:
        """The gradient over the operator's samples at theta (P,), in units of the loss over theta.

        Every product finds it on the way. Before the first one this is a pass of its own, whose
        graphs serve the products that follow where `keep_graph` says so.

        Raises:
            Diverged: the loss or the gradient is NaN or infinite.
        """
        return require_finite(self._at_theta().gradient(), "the gradient")

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """A v for (P,), or A V for the columns of (P, k), stored column by column.

        Raises:
            InvalidInput: the first dimension is not P, or another device than the loss's.
            Diverged: the loss or the product is NaN or infinite.
        """
        return self._product(vectors)[0]

    @shielded()
    def _product(self, vectors: Tensor, *, measured: bool = False) -> tuple[Tensor, Tensor | None]:
        """The product, and the norms of its columns' errors, see `SymmetricOperator`."""
        rows = rows_of(vectors, self)
        if check_once(self):
            self._linearization = None
        result, errors = multiplied(self._at_theta(), rows, measured=measured)
        self.num_matvecs += rows.shape[0]
        require_finite(result, f"a product with the {type(self).__name__}")
        return result[0] if vectors.dim() == 1 else result.T, errors

    def subsampled(self, fraction: float, generator: torch.Generator) -> Self | None:
        """The same operator over a random part of its samples: see the function `subsampled`."""
        if isinstance(self.objective, Objective) and not self.objective.is_mean():
            return None
        count = self.objective.num_samples
        samples = torch.arange(count, device="cpu") if self.samples is None else self.samples
        chosen = math.ceil(fraction * len(samples))
        targets = self.objective.targets_per_sample if isinstance(self.objective, Objective) else 1
        if chosen * targets < FEWEST:
            return None
        some = samples[torch.randperm(len(samples), generator=generator, device="cpu")[:chosen]]
        return self.over(self.objective, self.theta, some)

    def over(self, objective: Loss, theta: Tensor, samples: Tensor | None) -> Self:
        """The same operator of another loss, or elsewhere."""
        other = copy.copy(self)
        other.objective, other.theta, other.samples = objective, theta, samples
        other.num_matvecs, other._linearization = 0, None
        return other

    def by_differences(
        self, vector: Tensor, step: float, begin: Callable[[], object] = lambda: None
    ) -> Tensor | None:
        """The product with (P,) by first derivatives alone, (P,); None where there is no such way.

        Args:
            step: how far to go along the vector, to either side.
            begin: called before each evaluation of the loss.
        """
        return None

    @property
    def is_checked(self) -> bool:
        """Whether products are compared with differences, once."""
        return True

    def refuse(self, fault: str) -> None:
        """Raise, where products are found to be wrong.

        Raises:
            InvalidInput: with that message.
        """
        raise InvalidInput(fault)

    @abstractmethod
    def _linearize(self) -> Linearization:
        """The curvature at theta, over the samples, that products are made by."""

    def _at_theta(self) -> Linearization:
        if self._linearization is None:
            self._linearization = self._linearize()
        return self._linearization


class ChunkedOperator(LossOperator):
    """Base of operators that look inside of the loss: at a model's outputs, or at single samples.

    Arguments and attributes are those of `LossOperator`.

    Raises:
        InvalidInput: a loss that is no `Objective`, and so cannot be looked into.
    """

    objective: Objective

    def __init__(
        self,
        objective: Loss,
        theta: Tensor | None = None,
        samples: Tensor | None = None,
        *,
        keep_graph: bool = False,
    ) -> None:
        objective = require_objective(objective, type(self).__name__, self._needs)
        super().__init__(objective, theta, samples, keep_graph=keep_graph)

    _needs: str
    # Whether samples are evaluated one by one.
    _of_each = False

    @abstractmethod
    def _evaluations(self, weight: float) -> Iterator[Evaluation]:
        """Each chunk, evaluated at theta; `weight` is that of the samples."""

    @abstractmethod
    def _graph_of(self, evaluation: Evaluation) -> ChunkGraph:
        """The graph of one chunk that products go through."""

    def _linearize(self) -> ChunkedLinearization:
        weight = self.objective.prepared(self.theta, self.samples, of_each=self._of_each)

        def graphs() -> Iterator[ChunkGraph]:
            return map(self._graph_of, self._evaluations(weight))

        return ChunkedLinearization(self.objective, self.theta, graphs, keep_graph=self.keep_graph)


def subsampled(
    operator: SymmetricOperator, fraction: float, generator: torch.Generator
) -> SymmetricOperator | None:
    """The same operator over a random fraction of its samples, which costs that much of a product.

    None for one that is not made of samples, or where they would be fewer than `FEWEST`.
    """
    if isinstance(operator, OperatorAround):
        inside = subsampled(operator.operator, fraction, generator)
        if inside is None:
            return None
        around = copy.copy(operator)
        around.operator = inside
        return around
    return operator.subsampled(fraction, generator) if isinstance(operator, LossOperator) else None
