"""Multiply a block of vectors by the curvature of one chunk of samples, the faster of two ways.

A product is a backward pass through a kept graph. One pass a vector works for every model. One
vectorized pass for the whole block saves overheads, which decide on small chunks (2 to 3 times
faster on 32 samples of a small MLP); on large ones it falls out of the cache, on convolutions it is
slower, and some layers do not have it. So it serves chunks up to a size, which is given or
measured.

Example:
    >>> ChunkMultiplier(vectorize_up_to=256)
    ChunkMultiplier(vectorize_up_to=256)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from thalweg.errors import invalid
from thalweg.loss.guards.memory import is_out_of_memory

EVERY_SIZE = 2**31
"""More samples than any chunk has."""
FEW_VECTORS = 2
"""Vectorizing a backward pass costs more than so many passes, whatever the chunk."""


class ChunkGraph(Protocol):
    """The graph of one chunk: multiply with it as often as needed."""

    @property
    def fraction(self) -> float:
        """The weight of the chunk in the mean over all that was asked for."""
        ...

    @property
    def samples(self) -> int:
        """How many samples the chunk has."""
        ...

    @property
    def gradient(self) -> tuple[Tensor, ...]:
        """The gradient of the chunk's mean loss, shaped like the parameters."""
        ...

    @property
    def at(self) -> AbstractContextManager[object]:
        """Entered around every product."""
        ...

    def multiply(self, vectors: Sequence[Tensor], *, vectorized: bool) -> list[Tensor]:
        """The curvature of the chunk, not weighted, times tensors shaped like the parameters.

        Args:
            vectorized: each has a first dimension of k; so has the result.
        """
        ...


class ChunkMultiplier:
    """Multiplies blocks by the curvature of a chunk, the way that is faster for the chunk's size.

    Args:
        vectorize_up_to: samples in the largest chunk whose block is one vectorized pass; 0 for
            none. None: sizes not yet known are timed once, both ways; where vectorization fails or
            differs, it is not used.

    Raises:
        InvalidInput: a size below 0.

    An `Objective` has one as `multiplier`. Source: measured, see the module; there is the example.
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

    def multiply(self, graph: ChunkGraph, vectors: Sequence[Tensor]) -> Tensor:
        """The curvature of a chunk times k vectors, as rows (k, P), not weighted.

        Args:
            vectors: shaped like the parameters, with a first dimension of k.

        Raises:
            InvalidInput: vectorization was asked for, and a layer does not have it.
        """
        return self.faster(
            graph.samples,
            vectors[0].shape[0],
            lambda: _one_by_one(graph, vectors),
            lambda: _vectorized(graph, vectors),
        )

    def faster(
        self,
        samples: int,
        num_vectors: int,
        one_by_one: Callable[[], Tensor],
        vectorized: Callable[[], Tensor],
    ) -> Tensor:
        """The products with a chunk of samples, by whichever of two ways is faster.

        Args:
            samples: how many the chunk has.
            num_vectors: k.
            one_by_one: the products, a pass for each vector.
            vectorized: the same in one pass for all.

        Raises:
            InvalidInput: vectorization was asked for, and a layer does not have it.
        """
        if num_vectors <= FEW_VECTORS:
            return one_by_one()
        if self._up_to < samples < self._beyond:
            self._measure(samples, one_by_one, vectorized)
        if samples > self._up_to:
            return one_by_one()
        try:
            return vectorized()
        except Exception as error:
            if is_out_of_memory(error):
                raise
            one_by_one()  # where that fails as well, it is told
            raise invalid(
                "vectorize_up_to",
                self._up_to,
                "None or 0 for this model",
                f"torch says: {str(error).splitlines()[0]}",
            ) from error

    def _measure(
        self, samples: int, one_by_one: Callable[[], Tensor], vectorized: Callable[[], Tensor]
    ) -> None:
        """Time both ways on this chunk, and learn for which sizes it speaks."""
        expected, seconds = _timed(one_by_one)
        try:
            result, faster = _timed(vectorized)
        except Exception:
            self._beyond = self._up_to + 1  # where it fails, it fails for every chunk
            return
        if faster < seconds and agree(result, expected):
            self._up_to = samples
        else:
            self._beyond = samples

    def state_dict(self) -> dict[str, int]:
        """What is known, so that a resumed run multiplies the same way."""
        return {"up_to": self._up_to, "beyond": self._beyond}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restore what `state_dict` gave."""
        self._up_to, self._beyond = state["up_to"], state["beyond"]

    def __repr__(self) -> str:
        return f"ChunkMultiplier(vectorize_up_to={self._up_to if self._given else None})"


def derivatives(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    along: Sequence[Tensor],
    *,
    retain_graph: bool,
    create_graph: bool = False,
) -> tuple[Tensor | None, ...]:
    """J^T v by a backward pass; None for an input that the outputs do not depend on.

    Function modes (`TorchFunctionMode`) are in force in what the pass evaluates again, such as
    checkpoints: `torch.autograd.grad` puts them aside where it is given tensors.
    """
    ends: Sequence[Any] = outputs
    starts: Sequence[Any] = inputs
    if torch._C._is_torch_function_mode_enabled():
        ends, starts = ([get_gradient_edge(t) for t in tensors] for tensors in (outputs, inputs))
    return torch.autograd.grad(
        ends,
        starts,
        along,
        retain_graph=retain_graph,
        create_graph=create_graph,
        allow_unused=True,
    )


def pull_back(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    vectors: Sequence[Tensor],
    *,
    vectorized: bool,
    create_graph: bool = False,
) -> list[Tensor]:
    """J^T v for the Jacobian of outputs with respect to inputs; the graph is kept.

    Of a model: inside of the `at` of its `Evaluation`, since a backward pass may evaluate parts of
    it again. Of whatever else: inside of `shielded`.

    Args:
        vectors: shaped like the outputs; with a first dimension of k where `vectorized`.
        create_graph: the result can be differentiated again.
    """
    # An output that does not depend on the inputs (the gradient of a linear loss) has no graph.
    active = [i for i, output in enumerate(outputs) if output.requires_grad]

    def pulled(*along: Tensor) -> tuple[Tensor, ...]:
        parts: Sequence[Tensor | None] = [None] * len(inputs)
        if active:
            chosen = [outputs[i] for i in active]
            parts = derivatives(chosen, inputs, along, retain_graph=True, create_graph=create_graph)
        return tuple(
            torch.zeros_like(x) if part is None else part
            for part, x in zip(parts, inputs, strict=True)
        )

    chosen = [vectors[i] for i in active]
    if not vectorized:
        return list(pulled(*chosen))
    # Not `is_grads_batched`: it goes through tanh, GELU and log-softmax vector by vector. The
    # numbers of the vectors are there for outputs of which none is active.
    numbers = torch.arange(len(vectors[0]), device=vectors[0].device)
    return list(torch.vmap(lambda _, *along: pulled(*along))(numbers, *chosen))


def _one_by_one(graph: ChunkGraph, vectors: Sequence[Tensor]) -> Tensor:
    rows = []
    for one in zip(*vectors, strict=True):
        parts = graph.multiply(one, vectorized=False)
        rows.append(torch.cat([part.reshape(-1) for part in parts]))
    return torch.stack(rows)


def _vectorized(graph: ChunkGraph, vectors: Sequence[Tensor]) -> Tensor:
    parts = graph.multiply(vectors, vectorized=True)
    return torch.cat([part.reshape(part.shape[0], -1) for part in parts], dim=1)


def _timed(multiply: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """The result, and the seconds of a second call; the first one warms up."""
    # Copying to the host waits for an accelerator's queue: before the clock starts as well.
    float(multiply().sum())
    begin = time.perf_counter()
    result = multiply()
    float(result.sum())
    return result, time.perf_counter() - begin


def agree(first: Tensor, second: Tensor) -> bool:
    """Whether two ways gave the same, but for rounding."""
    tolerance = torch.finfo(first.dtype).eps ** 0.5
    return float((first - second).norm()) <= tolerance * float(second.norm())
