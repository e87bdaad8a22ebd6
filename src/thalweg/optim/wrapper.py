"""Base of optimizers that wrap another one: groups, state and gradients are those of the inner one.

Example:
    >>> import torch
    >>> inner = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1, momentum=0.9)
    >>> outer = Wrapper(inner)
    >>> outer.param_groups is inner.param_groups, outer.state is inner.state
    (True, True)
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from thalweg.tracking.wrapping import needs_closure


class Wrapper(Optimizer):
    """Base of optimizers that wrap another one; a subclass says what its `step` does.

    The parameter groups are the same objects, so that schedulers act on both.

    Args:
        inner: any `torch.optim.Optimizer`, already built.
    """

    def __init__(self, inner: Optimizer) -> None:
        self._inner = inner
        state = inner.state
        super().__init__(inner.param_groups, inner.defaults)
        self.param_groups = inner.param_groups
        # torch has put an empty one in its place.
        self.state = state  # type: ignore[misc]

    @property
    def state(self) -> defaultdict[Tensor, Any]:  # type: ignore[override]
        """The wrapped optimizer's state itself, also where that is replaced, as by `Combined`."""
        return self._inner.state

    @state.setter
    def state(self, value: defaultdict[Tensor, Any]) -> None:
        self._inner.state = value

    @property
    def needs_closure(self) -> bool:
        """Whether `step` must be given a closure, since that of the wrapped optimizer must."""
        return needs_closure(self._inner)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the wrapped optimizer's parameters."""
        self._inner.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state: nothing else is kept from one step to the next."""
        return self._inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the wrapped optimizer's state."""
        self._inner.load_state_dict(state_dict)
        self.param_groups = self._inner.param_groups
