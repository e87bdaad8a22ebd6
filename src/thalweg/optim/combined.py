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

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from thalweg.errors import InvalidInput, invalid
from thalweg.optim.copying import snapshot_of, undone_on_failure
from thalweg.optim.wrapper import OptimizerAround
from thalweg.tracking.wrapping import require_optimizer, unwrapped


class Combined(OptimizerAround):
    """Optimizers that step together, as one `torch.optim.Optimizer`.

    Its parameter groups are theirs, one optimizer after another, so each group has its own learning
    rate. They share one `state`, that of this object. A step that fails leaves parameters and state
    as they were: both are copied for the time of a step, 3 P numbers with Adam.

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
            require_optimizer("optimizers", optimizer)
            _refuse_unfit(optimizer)
        _refuse_shared_parameters(self.optimizers)
        self._shared: defaultdict[Tensor, Any] = defaultdict(dict)
        self._begin()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of torch; and a part that is saved by itself has its own part of the state."""
        super().__setstate__(state)
        for optimizer in self.optimizers:
            optimizer.register_state_dict_pre_hook(_own_state_only)
            optimizer.register_state_dict_post_hook(partial(_share_again, weakref.ref(self)))

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The groups of all, a new list of the same dictionaries."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> defaultdict[Tensor, Any]:  # type: ignore[override]
        """The one state that all write into, also after one of them has loaded another."""
        for optimizer in self.optimizers:
            if optimizer.state is not self._shared:
                for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                    self._shared.pop(parameter, None)
                self._shared.update(optimizer.state)
                optimizer.state = self._shared
        return self._shared

    @state.setter
    def state(self, value: defaultdict[Tensor, Any]) -> None:  # type: ignore[override]
        self._shared = value
        for optimizer in self.optimizers:
            optimizer.state = value

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The settings that all have, with the values of the first."""
        first, *others = (getattr(optimizer, "defaults", {}) for optimizer in self.optimizers)
        return {key: value for key, value in first.items() if all(key in o for o in others)}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Make one step with each; returns the loss of `closure`, evaluated once before."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with undone_on_failure(self):
            for optimizer in self.optimizers:
                optimizer.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all parameters."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: it is for one of the optimizers to add it, which this one sees.

        Raises:
            InvalidInput: always.
        """
        raise InvalidInput(
            "Combined.add_param_group: it is not known which of the optimizers the group is for;"
            " call add_param_group of that one, or combine them anew"
        )

    def _load(self, state_dict: dict[str, Any]) -> None:
        """Each optimizer its own part.

        Raises:
            InvalidInput: there is another number of parameter groups, or of parameters in one.
        """
        groups, present = state_dict["param_groups"], self.param_groups
        if len(groups) != len(present):
            raise invalid("state_dict", f"{len(groups)} parameter groups", f"{len(present)}")
        for number, (group, own) in enumerate(zip(groups, present, strict=True)):
            given, allowed = (f"{len(each['params'])} parameters" for each in (group, own))
            if given != allowed:
                raise invalid(f"state_dict, group {number}", given, allowed)
        for optimizer, own in zip(self.optimizers, self._by_optimizer(groups), strict=True):
            numbers = {number for group in own for number in group["params"]}
            state = {n: kept for n, kept in state_dict["state"].items() if n in numbers}
            optimizer.load_state_dict({"state": state, "param_groups": own})

    def _by_optimizer(self, groups: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
        begin = 0
        for optimizer in self.optimizers:
            end = begin + len(optimizer.param_groups)
            yield groups[begin:end]
            begin = end

    def state_snapshot(self) -> Callable[[], None]:
        """Copy the one state; returns a function that puts it back."""
        return snapshot_of(self.state)

    def _inner_optimizers(self) -> Sequence[Optimizer]:
        return self.optimizers


def _own_state_only(part: Optimizer) -> None:
    """Leave the others' state out, of whose parameters a part knows nothing."""
    own = [p for group in part.param_groups for p in group["params"]]
    part.state = defaultdict(dict, {p: part.state[p] for p in own if p in part.state})


def _share_again(whole: weakref.ref[Combined], part: Optimizer, _: object) -> None:
    combined = whole()
    if combined is not None:
        _ = combined.state


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
