"""The gradients of one loss at several points at once, for blocks of differences.

Gradients at 2 k points share nothing but the data. On small chunks overheads decide, and one
vectorized pass (`torch.vmap` over parameters) has them once. Whether it is taken follows from
sizes, and not from a clock, since the two ways choose other steps: measured by
`benchmarks/points_at_once.py`, it is 1.3 times faster or more up to 10^7 numbers of parameters
times places (samples, of sequences their tokens), and slower with convolutions. Points, gradients
and what a chunk's graph holds for each point have to fit: a pass has no more samples, of all its
points together, than a chunk of the loss may have.

Not for models that several processes have in parts, losses over a group of processes (all have to
go one way), random numbers fixed by a seed, batches evaluated whole (batch norm in training mode),
activation checkpointing, parameters at hand beside the module's attribute, and layers that `vmap`
does not have, or not with the same result: their points are evaluated one after another.

Example:
    >>> import torch
    >>> from thalweg.loss.objective import Objective
    >>> model, data = torch.nn.Linear(3, 2), (torch.randn(8, 3), torch.randn(8, 2))
    >>> loss = Objective(model, torch.nn.MSELoss(), data, product="difference", vectorize_up_to=8)
    >>> gradients = loss.at_once.gradients(loss, 20, loss.theta(), None, 8.0)
    >>> gradients(torch.randn(20, 8)).shape
    torch.Size([20, 8])
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from thalweg.linalg import require_finite
from thalweg.loss.chunk_multiplier import FEW_VECTORS, agree
from thalweg.loss.cost import BACKWARD, FORWARD
from thalweg.loss.evaluation import Evaluation
from thalweg.loss.gradient_differences import GradientsAt
from thalweg.loss.guards.memory import is_out_of_memory, within_memory
from thalweg.loss.reduce import Reduction
from thalweg.loss.samples import Batch, are_whole
from thalweg.surroundings import shielded

if TYPE_CHECKING:
    from thalweg.loss.objective import Objective

MOST_NUMBERS = 2**24
"""In the points of a block, and in their gradients: 64 MiB each in float32."""
MOST_WORK = 10**7
"""Places times parameters in a chunk for which one pass for all points is the faster way."""
MATRIX = 2
"""Dimensions of parameters that are no convolution's."""
NEAR = 1e-3
"""How far points of a trial are apart, relative to theta."""


class PointsAtOnce:
    """Whether and how the gradients of a loss at many points are evaluated together.

    Args:
        vectorize_up_to: samples in the largest chunk whose points share a pass, 0 for none; None
            for a choice by sizes.

    An `Objective` has one as `at_once`. Example: see the module.
    """

    def __init__(self, vectorize_up_to: int | None = None) -> None:
        self._up_to = vectorize_up_to
        # Whether the model can be evaluated so, with the same result; None before it was tried.
        self._shares: bool | None = None

    def gradients(
        self,
        loss: Objective,
        points: int,
        theta: Tensor,
        samples: Tensor | None,
        weight: float,
    ) -> GradientsAt | None:
        """What gives the gradients (m, P) at m points; None where one after another is faster.

        Args:
            points: about how many there are.
            theta: a point (P,) like them.
            samples, weight: as for `Objective.chunks`.
        """
        if not self._serves(loss, points):
            return None
        batch, count, *_ = next(loss.chunks(samples, weight=weight))
        size = self.passes(loss, points, count)
        if size <= FEW_VECTORS or not self._is_small(loss, batch, count):
            return None
        scales = 1 + NEAR * torch.arange(size, dtype=theta.dtype, device=theta.device)
        ways = [way(loss, theta * scales[:, None], batch) for way in (_one_by_one, _vectorized)]
        if not self._can_share(loss, batch, *ways):
            return None
        return lambda moved: self._gradients(loss, moved, samples, weight)

    def state_dict(self) -> dict[str, Any]:
        """What is known, so that a resumed run goes the same way."""
        return {"shares": self._shares}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self._shares = state["shares"]

    def passes(self, loss: Objective, points: int, count: int) -> int:
        """How many of the points are evaluated in one pass, over a chunk of so many samples."""
        return points if loss.chunk_size is None else min(points, loss.chunk_size // count)

    def _serves(self, loss: Objective, points: int) -> bool:
        return (
            type(loss.reduction) is Reduction
            and loss.sharding is None
            and loss.evaluator.seed is None
            and not are_whole(loss.samples)
            and points > FEW_VECTORS
            and points * loss.num_parameters <= MOST_NUMBERS
        )

    def _is_small(self, loss: Objective, batch: Batch, count: int) -> bool:
        """Whether one pass is the faster way for a chunk."""
        if self._up_to is not None:
            return count <= self._up_to
        if any(len(shape) > MATRIX for shape in loss.layout.shapes):
            return False
        places = max([count, *map(_places, tree_leaves(batch))])
        return places * loss.num_parameters <= MOST_WORK

    def _can_share(
        self,
        loss: Objective,
        batch: Batch,
        one_by_one: Callable[[], Tensor],
        vectorized: Callable[[], Tensor],
    ) -> bool:
        """Whether points can share a pass at all, with the same result; looked at once."""
        if self._shares is None:
            try:
                loss.evaluator.refuse_sharing(batch)
                self._shares = agree(vectorized(), one_by_one())
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                self._shares = False
        return self._shares

    @shielded()
    def _gradients(
        self, loss: Objective, points: Tensor, samples: Tensor | None, weight: float
    ) -> Tensor:
        """The gradients (m, P) of the mean loss."""

        def compute() -> Tensor:
            total = torch.zeros_like(points)
            for batch, count, fraction, _ in loss.chunks(samples, weight=weight):
                loss.cost.add(count, len(points) * (FORWARD + BACKWARD))
                size = max(1, self.passes(loss, len(points), count))
                small = self._is_small(loss, batch, count)
                parts = [
                    self._of_chunk(loss, some, batch, at_once=small and size > 1)
                    for some in points.split(size)
                ]
                total.add_(torch.cat(parts), alpha=fraction)
            return total

        return require_finite(within_memory(loss, compute), "the gradient")

    def _of_chunk(self, loss: Objective, points: Tensor, batch: Batch, *, at_once: bool) -> Tensor:
        if at_once and self._shares:
            try:
                return _vectorized(loss, points, batch)()
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                # Of these samples or points it cannot; where it is another trouble, it comes again.
                self._shares = False
        return _one_by_one(loss, points, batch)()


def _places(leaf: object) -> int:
    """In how many places a layer is applied: tokens, or rows of features."""
    if not isinstance(leaf, Tensor):
        return 0
    return math.prod(leaf.shape[:-1] if leaf.is_floating_point() else leaf.shape)


def _one_by_one(loss: Objective, points: Tensor, batch: Batch) -> Callable[[], Tensor]:
    """The gradients (m, P) of a chunk's mean loss, a pass for each."""

    def gradients() -> Tensor:
        found = []
        for point in points:
            pieces = loss.evaluator.pieces(point)
            outputs, value, at = loss.evaluator.evaluate(pieces, batch, twice=False)
            require_finite(value.detach(), "the loss")
            evaluation = Evaluation(1.0, 1, at.leaves, outputs, value, at)
            found.append(loss.layout.flatten(loss.gradient_of(evaluation)))
        return torch.stack(found)

    return gradients


def _vectorized(loss: Objective, points: Tensor, batch: Batch) -> Callable[[], Tensor]:
    """The same in one pass."""

    def value(point: Tensor) -> Tensor:
        return loss.evaluator.outputs_and_loss(loss.layout.unflatten(point), batch)[1]

    def gradients() -> Tensor:
        leaf = points.detach().requires_grad_()
        with loss.evaluator.settings(twice=False), warnings.catch_warnings():
            # Of operations that are slow so: that is measured.
            warnings.filterwarnings("ignore", message="There is a performance drop")
            losses = torch.vmap(value)(leaf)
            (found,) = torch.autograd.grad(losses.sum(), leaf)
        require_finite(losses.detach(), "the loss")
        return found

    return gradients
