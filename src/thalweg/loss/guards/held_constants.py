"""Values that a forward pass takes out of the graph, held while the parameters move.

A forward pass may use a value of its own as a constant: by `detach()`, `.data`, `.item()`, under
`no_grad`, or as the vector of an Embedding at its `padding_idx`. Its derivatives are those of the
loss with that value held. A difference of gradients is to be compared with them only if the value
is held there as well.

Example:
    >>> import torch
    >>> held = HeldConstants()
    >>> function = held.around(lambda x: x * x.detach())
    >>> x = torch.tensor(3.0, requires_grad=True)
    >>> _ = function(x)
    >>> held.replay()
    >>> function(x + 1).item()
    12.0
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

TAKEN_OUT = frozenset(("detach", "item", "tolist", "numpy", "__float__", "__int__", "__array__"))


class HeldConstants:
    """Records what functions take out of the graph, and gives it back at later calls.

    Attributes:
        found: whether anything was taken out.
        aligned: whether later calls took out as much as the first.
    """

    def __init__(self) -> None:
        self._tape: list[Any] = []
        self._place: int | None = None
        self.aligned = True

    @property
    def found(self) -> bool:
        return bool(self._tape)

    def record(self) -> None:
        """Forget all, and record anew."""
        self._tape, self._place = [], None

    def replay(self) -> None:
        """From now on give back what was recorded, from its beginning."""
        self.aligned = self.aligned and self._place in (None, len(self._tape))
        self._place = 0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, whose constants are held."""

        @functools.wraps(function)
        def held(*args: Any, **kwargs: Any) -> Any:
            with _Mode(self):
                return function(*args, **kwargs)

        return held

    def taken(self, compute: Callable[[], Any]) -> Any:
        """A value that is taken out: computed and kept, or the one that was kept."""
        if self._place is None:
            self._tape.append(tree_map(_copied, compute()))
            return tree_map(_copied, self._tape[-1])
        self._place += 1
        if self._place > len(self._tape):
            self.aligned = False
            return compute()
        return tree_map(_copied, self._tape[self._place - 1])


class _Mode(TorchFunctionMode):
    def __init__(self, held: HeldConstants) -> None:
        super().__init__()
        self.held = held
        self._without_graph = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "_set_grad_enabled":
            # Not so inside of a `torch.autograd.Function`, which has a backward pass of its own.
            self._without_graph = not args[0]
        if func is functional.embedding:
            return self._embedded(func(*args, **kwargs), *args, **kwargs)
        if not name.endswith("_") or name.endswith("__"):
            recording = torch.is_grad_enabled()
            data = name == "__get__" and getattr(func, "__self__", None) is Tensor.data
            taken = recording and (name in TAKEN_OUT or data)
            leaves = tree_leaves((args, kwargs)) if taken or self._without_graph else ()
            if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves) and (
                taken or not recording
            ):
                return self.held.taken(lambda: func(*args, **kwargs))
        return func(*args, **kwargs)

    def _embedded(
        self,
        output: Tensor,
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        *_: Any,
        **__: Any,
    ) -> Tensor:
        """Vectors of an embedding, of which those at the padding have no derivative by torch."""
        if padding_idx is None or not output.requires_grad:
            return output
        constant = self.held.taken(lambda: output)
        return torch.where((input == padding_idx % len(weight)).unsqueeze(-1), constant, output)


def _copied(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf
