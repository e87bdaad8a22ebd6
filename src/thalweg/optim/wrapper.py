"""Bases of optimizers around others: groups, state and defaults are those of the inner ones.

Example:
    >>> import torch
    >>> inner = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1, momentum=0.9)
    >>> outer = Wrapper(inner)
    >>> outer.param_groups is inner.param_groups, outer.state is inner.state
    (True, True)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from thalweg.optim.copying import Copyable, state_snapshot
from thalweg.tracking.wrapping import announce, needs_closure, require_optimizer


class OptimizerAround(Copyable):
    """Base of optimizers made of others.

    It holds no groups and no state of its own, so that there is nothing to differ: a subclass has
    `param_groups`, `state` and `defaults` as properties, asked of the inner ones each time.
    """

    def _begin(self) -> None:
        """In the place of `Optimizer.__init__`, which would put empty groups and state in place.

        Call it last: a subclass has its inner optimizers by then.
        """
        self.__setstate__({})

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of torch: hooks, and a step that runs them; the inner ones get to know this one."""
        super().__setstate__(state)
        announce(self, self._inner_optimizers())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave, in the inner optimizers too."""
        state_dict = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        self._load(state_dict)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _load(self, state_dict: dict[str, Any]) -> None:
        raise NotImplementedError

    def _inner_optimizers(self) -> Sequence[Optimizer]:
        raise NotImplementedError

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]


class Wrapper(OptimizerAround):
    """Base of optimizers that wrap another one; a subclass says what its `step` does.

    Groups, state and defaults are those of the inner one at any time: schedulers and scalers,
    `load_state_dict` and `add_param_group` do the same through either.

    Args:
        inner: any `torch.optim.Optimizer`, already built.
    """

    def __init__(self, inner: Optimizer) -> None:
        require_optimizer("optimizer", inner)
        self._inner = inner
        self._begin()

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The wrapped optimizer's groups themselves, also after it has loaded others."""
        return self._inner.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:  # type: ignore[override]
        self._inner.param_groups = value

    @property
    def state(self) -> defaultdict[Tensor, Any]:  # type: ignore[override]
        """The wrapped optimizer's state itself, also where that is replaced, as by `Combined`."""
        return self._inner.state

    @state.setter
    def state(self, value: defaultdict[Tensor, Any]) -> None:  # type: ignore[override]
        self._inner.state = value

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The wrapped optimizer's: what a new group gets, and what schedulers look at."""
        # Some that skip `Optimizer.__init__` have none.
        return getattr(self._inner, "defaults", {})

    @property
    def needs_closure(self) -> bool:
        """Whether `step` must be given a closure, since that of the wrapped optimizer must."""
        return needs_closure(self._inner)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the wrapped optimizer's parameters."""
        self._inner.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimizer."""
        self._inner.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state, and what this class keeps from one step to the next."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state = self._saved()
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, state)
            state = state if changed is None else changed
        return state

    def _saved(self) -> dict[str, Any]:
        return self._inner.state_dict()

    def _load(self, state_dict: dict[str, Any]) -> None:
        self._inner.load_state_dict(state_dict)

    def state_snapshot(self) -> Callable[[], None]:
        """Copy the wrapped optimizer's state; returns a function that puts it back."""
        return state_snapshot(self._inner)

    def _inner_optimizers(self) -> Sequence[Optimizer]:
        return (self._inner,)
