"""The Hessian of one chunk of samples times a block of vectors: one backward pass each, or one for
all.

A product with H is a backward pass through the graph of the gradient. One pass a vector works for
every model. One vectorized pass for the whole block saves overheads, which decide on small chunks
(2 to 3 times faster on 32 samples of a small MLP); on large ones it falls out of the cache, on
convolutions it is slower, and some layers do not have it. So it serves chunks up to a size, which
is given or measured.

Example:
    >>> products = BlockProducts(vectorize_up_to=256)
    >>> products
    BlockProducts(vectorize_up_to=256)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from thalweg.curvature.layout import ParameterLayout
from thalweg.errors import invalid

EVERY_SIZE = 2**31
"""More samples than any chunk has."""

FEW_VECTORS = 2
"""Vectorizing a backward pass costs more than so many passes, whatever the chunk."""


class Linearization(NamedTuple):
    """The gradient of one chunk with its graph: multiply it by H of the chunk as often as needed.

    Attributes:
        share: the weight of the chunk in the mean over all that was asked for.
        samples: how many samples the chunk has.
        leaves: the parameters, leaves of the graph.
        gradient: the gradient of the chunk's mean loss, shaped like the parameters.
    """

    share: float
    samples: int
    leaves: tuple[Tensor, ...]
    gradient: tuple[Tensor, ...]


class BlockProducts:
    """Multiplies blocks by the Hessian of a chunk, the way that is faster for the chunk's size.

    Args:
        vectorize_up_to: samples in the largest chunk whose block is one vectorized pass; 0 for
            none. None: sizes not yet known are timed once, both ways; where vectorization fails or
            differs, it is not used.

    Raises:
        InvalidInput: a size below 0.
    """

    def __init__(self, vectorize_up_to: int | None = None) -> None:
        if vectorize_up_to is not None and vectorize_up_to < 0:
            raise invalid("vectorize_up_to", vectorize_up_to, "an integer >= 0, or None to measure")
        self._given = vectorize_up_to is not None
        # Chunks up to the first are known to be faster vectorized, from the second on slower.
        self._up_to = vectorize_up_to or 0
        self._beyond = EVERY_SIZE if vectorize_up_to is None else self._up_to + 1

    @property
    def vectorize_up_to(self) -> int:
        """The largest chunk that is known to be vectorized."""
        return self._up_to

    def multiply(
        self, layout: ParameterLayout, linearization: Linearization, rows: Tensor
    ) -> Tensor:
        """H of the chunk times each row of (k, P), returned as rows (k, P), not weighted.

        Raises:
            InvalidInput: vectorization was asked for, and a layer does not have it.
        """
        if rows.shape[0] <= FEW_VECTORS:
            return _one_by_one(layout, linearization, rows)
        if self._up_to < linearization.samples < self._beyond:
            self._measure(layout, linearization, rows)
        if linearization.samples > self._up_to:
            return _one_by_one(layout, linearization, rows)
        try:
            return _multiply(layout, linearization, rows)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError) as error:
            raise invalid(
                "vectorize_up_to",
                self._up_to,
                "None or 0 for this model",
                f"torch says: {str(error).splitlines()[0]}",
            ) from error

    def _measure(self, layout: ParameterLayout, linearization: Linearization, rows: Tensor) -> None:
        """Time both ways on this chunk, and learn for which sizes it speaks."""
        one_by_one, seconds = _timed(lambda: _one_by_one(layout, linearization, rows))
        try:
            vectorized, faster = _timed(lambda: _multiply(layout, linearization, rows))
        except (RuntimeError, NotImplementedError):
            self._beyond = self._up_to + 1  # where it fails, it fails for every chunk
            return
        if faster < seconds and _agree(vectorized, one_by_one):
            self._up_to = linearization.samples
        else:
            self._beyond = linearization.samples

    def state_dict(self) -> dict[str, int]:
        """What is known, so that a resumed run multiplies the same way."""
        return {"up_to": self._up_to, "beyond": self._beyond}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restore what `state_dict` gave."""
        self._up_to, self._beyond = state["up_to"], state["beyond"]

    def __repr__(self) -> str:
        return f"BlockProducts(vectorize_up_to={self._up_to if self._given else None})"


def _one_by_one(layout: ParameterLayout, linearization: Linearization, rows: Tensor) -> Tensor:
    return torch.stack([_multiply(layout, linearization, row) for row in rows])


def _multiply(layout: ParameterLayout, linearization: Linearization, vectors: Tensor) -> Tensor:
    """H times a vector (P,), or each row of (k, P) in one vectorized backward pass."""
    # A gradient that does not depend on theta (a linear loss) has no graph: its part of H is 0.
    active = [i for i, g in enumerate(linearization.gradient) if g.requires_grad]
    if not active:
        return torch.zeros_like(vectors)
    shaped = layout.unflatten(vectors)
    parts = torch.autograd.grad(
        [linearization.gradient[i] for i in active],
        linearization.leaves,
        [shaped[i] for i in active],
        retain_graph=True,
        allow_unused=True,
        is_grads_batched=vectors.dim() == 2,
    )
    lead = vectors.shape[:-1]
    flat = [
        vectors.new_zeros((*lead, leaf.numel())) if part is None else part.reshape((*lead, -1))
        for part, leaf in zip(parts, linearization.leaves, strict=True)
    ]
    return torch.cat(flat, dim=-1)


def _timed(multiply: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """The result, and the seconds of a second call; the first one warms up."""
    multiply()
    begin = time.perf_counter()
    result = multiply()
    # Copying to the host waits for an accelerator's queue.
    float(result.sum())
    return result, time.perf_counter() - begin


def _agree(first: Tensor, second: Tensor) -> bool:
    tolerance = torch.finfo(first.dtype).eps ** 0.5
    return float((first - second).norm()) <= tolerance * float(second.norm())
