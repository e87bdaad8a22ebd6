"""A computation on tensors, recorded once for each shape and replayed from then on.

Nested transforms of `torch.func` work out at every call which elementary operations they consist
of. For products with the Hessian of a small MLP that takes a fifth of the time with 36 samples on a
CPU, and half of it with one sample. Here the operations are recorded once and then run alone; on a
CUDA device as one CUDA graph, which is one launch in place of hundreds.

Example:
    >>> import torch
    >>> replay = Replay()
    >>> def squares(x):
    ...     return torch.vmap(torch.func.grad(lambda y: (y**3).sum()))(x)
    >>> [replay("squares", squares, torch.full((2,), float(i))).tolist() for i in (1, 2)]
    [[3.0, 3.0], [12.0, 12.0]]
    >>> replay.recorded
    1
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from thalweg.errors import InvalidInput, invalid
from thalweg.loss.guards.memory import is_out_of_memory

WARM_UP = 3
"""Calls before a CUDA graph is captured, in which libraries choose their kernels."""


class Replay:
    """Calls functions of tensors by recordings of what they did the first time.

    A function must do the same operations for all arguments of one shape, dtype and device, and
    keep no result. Whatever else it reads, such as buffers of a model, must stay where it is in
    memory; its values are read at every call.

    Example: see the module.
    """

    def __init__(self) -> None:
        self._recordings: dict[object, Callable[..., Any]] = {}
        # One pool for all graphs: results are copied out before another graph runs.
        self._pool: Any = None

    @property
    def recorded(self) -> int:
        """How many recordings there are: functions times shapes."""
        return len(self._recordings)

    def __call__(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """The function's result for arguments that are tensors, or trees of tensors.

        Args:
            name: one for each function that does something else.
            function: called where its name and the arguments' shapes are new.

        Raises:
            InvalidInput: the function looks at values, or at something that is no tensor.
        """
        leaves, structure = tree_flatten(arguments)
        if not all(isinstance(leaf, Tensor) for leaf in leaves):
            raise _unfit("a batch holds something else than tensors")
        leaves = [leaf.detach() for leaf in leaves]
        shapes = tuple((leaf.shape, leaf.dtype, leaf.device) for leaf in leaves)
        key = (name, str(structure), shapes)
        if key not in self._recordings:
            self._recordings[key] = self._record(
                lambda *flat: function(*tree_unflatten(list(flat), structure)), leaves
            )
        # What autocast does is in the recording already.
        with torch.no_grad(), torch.autocast(leaves[0].device.type, enabled=False):
            return self._recordings[key](*leaves)

    def _record(self, function: Callable[..., Any], leaves: Sequence[Tensor]) -> Callable[..., Any]:
        try:
            operations = make_fx(function)(*leaves)
        except InvalidInput:
            raise
        except (RuntimeError, NotImplementedError, ValueError) as error:
            if is_out_of_memory(error):
                raise
            raise _unfit(f"torch says: {str(error).splitlines()[0]}") from error
        return self._captured(operations, leaves) if leaves[0].is_cuda else operations

    def _captured(
        self, operations: Callable[..., Any], leaves: Sequence[Tensor]
    ) -> Callable[..., Any]:
        """The operations as a CUDA graph, see "CUDA semantics" in the documentation of torch."""
        with torch.no_grad(), torch.cuda.device(leaves[0].device):
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            held = [leaf.clone() for leaf in leaves]
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(WARM_UP):
                    operations(*held)
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                results = operations(*held)

        def replayed(*given: Tensor) -> Any:
            for place, value in zip(held, given, strict=True):
                place.copy_(value)
            graph.replay()
            return tree_map(torch.clone, results)

        return replayed


def _unfit(reason: str) -> InvalidInput:
    return invalid("replay", True, "False for this model", reason)
