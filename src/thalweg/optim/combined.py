"""Several optimizers, each with its own parameters, as one.

For methods that take some parameters only, such as Muon, which takes matrices.

Example:
    >>> import torch
    >>> model = torch.nn.Linear(3, 2)
    >>> muon = torch.optim.Muon([model.weight], lr=0.02)
    >>> adamw = torch.optim.AdamW([model.bias], lr=0.001)
    >>> optimizer = Combined([muon, adamw])
    >>> [group["lr"] for group in optimizer.param_groups]
    [0.02, 0.001]
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from thalweg.errors import InvalidInput, invalid
from thalweg.tracking.wrapping import unwrapped


class Combined(Optimizer):
    """Optimizers that step together, as one `torch.optim.Optimizer`.

    Its parameter groups are theirs, one optimizer after another, so each group has its own learning
    rate. They share one `state`, that of this object: save and load this one, not its parts.

    Args:
        optimizers: at least one, already built. One that wraps another, or needs a closure, goes
            around the whole instead: `SAM(Combined(...))`.

    Attributes:
        optimizers: as given.

    Raises:
        InvalidInput: no optimizer; one that wraps another or needs a closure; a parameter in two.
    """

    def __init__(self, optimizers: Iterable[Optimizer]) -> None:
        self.optimizers: tuple[Optimizer, ...] = tuple(optimizers)
        if not self.optimizers:
            raise invalid("optimizers", [], "at least one optimizer")
        for optimizer in self.optimizers:
            _refuse_unfit(optimizer)
        _refuse_shared_parameters(self.optimizers)
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        # No defaults of its own: they would be filled into the groups of optimizers without them.
        super().__init__(groups, {})
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Make one step with each; returns the loss of `closure`, evaluated once before."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all parameters."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused once built: give the parameters to one of the optimizers before.

        Raises:
            InvalidInput: always, after construction.
        """
        # The constructor of `Optimizer` adds the groups of all, one by one.
        if len(self.param_groups) == self._count():
            raise InvalidInput(
                "Combined.add_param_group: it is not known which of the optimizers the group is"
                " for; add it to one of them and combine them anew"
            )
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave, each optimizer its own part.

        Raises:
            InvalidInput: it has another number of parameter groups.
        """
        groups = state_dict["param_groups"]
        if len(groups) != self._count():
            raise invalid("state_dict", f"{len(groups)} parameter groups", f"{self._count()}")
        for optimizer, own in zip(self.optimizers, self._by_optimizer(groups), strict=True):
            numbers = {number for group in own for number in group["params"]}
            state = {n: kept for n, kept in state_dict["state"].items() if n in numbers}
            optimizer.load_state_dict({"state": state, "param_groups": own})
        self._share()

    def _count(self) -> int:
        return sum(len(optimizer.param_groups) for optimizer in self.optimizers)

    def _by_optimizer(self, groups: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
        begin = 0
        for optimizer in self.optimizers:
            end = begin + len(optimizer.param_groups)
            yield groups[begin:end]
            begin = end

    def _share(self) -> None:
        """Take over the groups and the states of all, and let all of them write into one state."""
        self.param_groups = [g for optimizer in self.optimizers for g in optimizer.param_groups]
        self.state: defaultdict[Tensor, Any] = defaultdict(dict)
        for optimizer in self.optimizers:
            self.state.update(optimizer.state)
            optimizer.state = self.state


def _refuse_unfit(optimizer: Optimizer) -> None:
    found = unwrapped(optimizer)
    wraps = isinstance(optimizer, Combined) or found.base is not optimizer
    if wraps or found.needs_closure:
        name = type(optimizer).__name__
        raise invalid(
            "optimizers",
            name,
            "optimizers that wrap no other and need no closure",
            "wrap the Combined instead" if wraps else "",
        )


def _refuse_shared_parameters(optimizers: Iterable[Optimizer]) -> None:
    owner: dict[int, int] = {}
    for number, optimizer in enumerate(optimizers):
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            first = owner.setdefault(id(parameter), number)
            if first != number:
                raise InvalidInput(
                    f"optimizers: a parameter of shape {tuple(parameter.shape)} is in numbers"
                    f" {first} and {number}; give each parameter to one of them"
                )
