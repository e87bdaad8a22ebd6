"""Copies of optimizers, and snapshots of their states.

Example:
    >>> import torch
    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    >>> undo = state_snapshot(optimizer)
    >>> weight.grad = torch.ones(2)
    >>> optimizer.step()
    >>> undo()
    >>> len(optimizer.state)
    0
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from thalweg.errors import InvalidInput


class Copyable(Optimizer):
    """Base of optimizers whose copies have all of their attributes.

    torch copies and pickles groups, state and defaults only. As there, hooks and what a scheduler
    has put around `step` stay behind: they belong to the original.
    """

    kept_in_copies: ClassVar[frozenset[str]] = frozenset()
    """Attributes of which a copy has the very object, such as a group of processes."""

    def __getstate__(self) -> dict[str, Any]:
        """All attributes but hooks and a scheduler's marks."""
        left = ("step", "_opt_called")
        own = vars(self).items()
        return {k: v for k, v in own if k not in left and not k.startswith("_optimizer_")}

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy with parameters of its own: copy model and optimizer together to keep the tie.

        `copy.deepcopy((model, optimizer))` gives an optimizer of the copied model.

        Raises:
            InvalidInput: something that it holds cannot be copied.
        """
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        state: dict[str, Any] = {}
        for name, value in self.__getstate__().items():
            try:
                state[name] = value if name in self.kept_in_copies else copy.deepcopy(value, memo)
            except (RuntimeError, TypeError, NotImplementedError) as error:
                raise InvalidInput(
                    f"deepcopy of {type(self).__name__}: its {name} cannot be copied ({error});"
                    " build another one for the copied model, and load the state_dict of this one"
                ) from error
        copied.__setstate__(state)
        return copied


@contextmanager
@torch.no_grad()
def undone_on_failure(optimizer: Optimizer) -> Iterator[None]:
    """Put an optimizer's parameters and state back where the body raises.

    It takes the memory of both while it lasts.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    before = [p.clone() for p in parameters]
    undo = state_snapshot(optimizer)
    try:
        yield
    except BaseException:
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)
        undo()
        raise


def state_snapshot(optimizer: Optimizer) -> Callable[[], None]:
    """Copy the state of an optimizer; returns a function that puts it back, into the same tensors.

    Its parameters are not in it. It takes the memory of the state: P numbers for SGD with momentum,
    2 P for Adam.
    """
    own: Callable[[], Callable[[], None]] | None = getattr(optimizer, "state_snapshot", None)
    return snapshot_of(optimizer.state) if own is None else own()


def snapshot_of(state: MutableMapping[Tensor, Any]) -> Callable[[], None]:
    """Copy the state of each parameter; returns a function that puts it back in place."""
    tensors: list[tuple[Tensor, Tensor]] = []
    kept = [(parameter, held, _noted(held, tensors)) for parameter, held in state.items()]

    def undo() -> None:
        for tensor, value in tensors:
            tensor.copy_(value)
        state.clear()
        for parameter, held, noted in kept:
            if isinstance(held, dict):
                held.clear()
                held.update(noted)
                state[parameter] = held
            else:
                state[parameter] = noted

    return undo


def _noted(value: Any, tensors: list[tuple[Tensor, Tensor]]) -> Any:
    """The value with containers of its own around the same tensors, whose values are noted."""
    if isinstance(value, Tensor):
        tensors.append((value, value.detach().clone()))
        return value
    if isinstance(value, dict):
        return {key: _noted(part, tensors) for key, part in value.items()}
    if isinstance(value, list):
        return [_noted(part, tensors) for part in value]
    return value
