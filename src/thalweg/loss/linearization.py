"""A curvature of a loss at one point, as a sum over chunks of samples.

Each chunk has a graph through which vectors are multiplied; only the sum of all chunks is held, or,
where many products follow one another, the graphs too.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from thalweg.errors import InvalidInput, level_of_caller
from thalweg.loss.chunk_multiplier import ChunkGraph, ChunkMultiplier, pull_back
from thalweg.loss.cost import PRODUCT, Cost
from thalweg.loss.evaluation import Evaluator, Point
from thalweg.loss.guards.memory import (
    GraphsRebuilt,
    InChunks,
    is_out_of_memory,
    within_memory,
)
from thalweg.loss.layout import ParameterLayout
from thalweg.loss.reduce import Reduction
from thalweg.sharding import ShardedVector, whole


class Chunked(InChunks, Protocol):
    """What a sum over chunks needs of an `Objective`."""

    layout: ParameterLayout
    multiplier: ChunkMultiplier
    reduction: Reduction
    cost: Cost
    evaluator: Evaluator


class ChunkedLinearization:
    """The gradient at theta, and products with a curvature there, chunk by chunk.

    Args:
        objective: how chunks are multiplied, and their sums closed.
        theta: the point (P,).
        graphs: yields the graph of each chunk at theta, anew at each call.
        keep_graph: hold all graphs between products, at the price of their memory.

    With the graphs of gradients it is the `Linearization` of the loss; with others the curvature is
    another one, such as Gauss-Newton.
    """

    def __init__(
        self,
        objective: Chunked,
        theta: Tensor,
        graphs: Callable[[], Iterator[ChunkGraph]],
        *,
        keep_graph: bool,
    ) -> None:
        self._objective = objective
        self._theta = theta
        self._graphs = graphs
        self._keep_graph = keep_graph
        self._kept: list[ChunkGraph] | None = None
        # Graphs that the pass at work holds.
        self._held = 0
        # Of a model in shards, held where its graphs were to be: in all processes or in none.
        self._holds_point = keep_graph
        self._point: Point | None = None
        # Over this process's samples; and over all, once it was asked for.
        self._own_gradient: Tensor | None = None
        self._gradient: Tensor | None = None

    def gradient(self) -> Tensor:
        """The gradient (P,): found on the way by the first product, before it by a pass alone."""
        if self._gradient is None:
            with self._whole():
                (self._gradient,) = self._objective.reduction.sums(self._part, self._theta)
        return self._gradient

    def multiply(self, rows: Tensor) -> Tensor:
        """The curvature times each row of (k, P), as rows."""
        with self._whole():
            if not isinstance(rows, ShardedVector):
                return self._products(rows)
            # No more of the block is whole at a time than a process holds of all of it.
            some = math.ceil(len(rows) / rows.sharding.ranks)
            return torch.cat([self._products(whole(part)) for part in rows.split(some)])

    def _products(self, rows: Tensor) -> Tensor:
        """The same of rows of all P numbers; the result is in parts where parameters are."""

        def own() -> tuple[Tensor]:
            result = within_memory(self._objective, lambda: self._pass_within_memory(rows))
            return (torch.zeros_like(rows) if result is None else result,)

        return self._objective.reduction.sums(own, rows)[0]

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """A model in shards is gathered before a pass begins, or was for graphs that are kept."""
        with self._objective.evaluator.at_point(self._theta, self._point) as point:
            self._point = point if self._holds_point else None
            yield

    def _part(self) -> tuple[Tensor]:
        """The gradient over this process's samples."""
        if self._own_gradient is None:
            within_memory(self._objective, lambda: self._pass_within_memory(None))
        assert self._own_gradient is not None
        return (self._own_gradient,)

    def _pass_within_memory(self, rows: Tensor | None) -> Tensor | None:
        """A pass; where memory runs out while graphs are held, one that holds none."""
        try:
            return self._pass(rows)
        except Exception as error:
            # A first chunk that fails is too large by itself, whatever is held.
            if not (self._held and is_out_of_memory(error)):
                raise
        # Outside of the handler, whose traceback would keep the graphs alive.
        self._keep_graph = False
        warnings.warn(
            "out of memory while the graphs of all chunks are held for products: from now on they"
            " are built anew for each, which takes about 1.5 times as long",
            GraphsRebuilt,
            stacklevel=level_of_caller(),
        )
        return self._pass(rows)

    def _pass(self, rows: Tensor | None) -> Tensor | None:
        """The products over this process's samples, if any; leaves the gradient known."""
        objective = self._objective
        layout = objective.layout.in_one_piece
        shaped = None if rows is None else layout.unflatten(rows)
        result: Tensor | None = None
        gradient: Tensor | None = None
        if self._own_gradient is None:
            like = {"dtype": self._theta.dtype, "device": self._theta.device}
            gradient = torch.zeros(layout.num_parameters, **like)
        chunks = self._kept or self._graphs()
        # Given up until all is done: where memory runs out, what is kept must not stay.
        self._kept, kept = None, []
        self._held = 0
        for chunk in chunks:
            if shaped is not None:
                with chunk.at:
                    try:
                        part = objective.multiplier.multiply(chunk, shaped)
                    except (RuntimeError, InvalidInput) as error:
                        if "divisible by 2" not in str(error):
                            raise
                        # Seen as complex numbers, which have to begin at an even place.
                        shaped = [vectors.clone() for vectors in shaped]
                        part = objective.multiplier.multiply(chunk, shaped)
                objective.cost.add(chunk.samples, len(part) * PRODUCT)
                # In place: on small chunks the passes over (k, P) cost more than the arithmetic.
                if chunk.fraction != 1:
                    part.mul_(chunk.fraction)
                result = part if result is None else result.add_(part)
            if gradient is not None:
                parts = [g.detach() for g in chunk.gradient]
                gradient.add_(layout.flatten(parts), alpha=chunk.fraction)
            if self._keep_graph:
                kept.append(chunk)
                self._held = len(kept)
        self._kept = kept or None
        if gradient is not None:
            self._own_gradient = gradient
        return result


@dataclass(frozen=True)
class GradientGraph:
    """The gradient of a chunk as a function of the parameters: its Jacobian is the Hessian."""

    fraction: float
    samples: int
    leaves: tuple[Tensor, ...]
    gradient: tuple[Tensor, ...]
    at: AbstractContextManager[object]

    def multiply(self, vectors: Sequence[Tensor], *, vectorized: bool) -> list[Tensor]:
        """See `ChunkGraph`."""
        return pull_back(self.gradient, self.leaves, vectors, vectorized=vectorized)
