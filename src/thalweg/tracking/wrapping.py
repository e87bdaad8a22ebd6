"""Optimizers that wrap others: which one makes the step, and what is done around it.

A wrapper is known by the attribute that holds what it wraps: `optimizer` or `_optimizer`, as in
`SplitUpdate`, Accelerate and Lightning, or `base_optimizer` beside `rho`, as in `SAM` and in the
common public code. Seen from inside, Thalweg's own wrappers are known to what they wrap.

Example:
    >>> import torch
    >>> from thalweg.spectrum.subspace import Subspace
    >>> from thalweg.tracking.source import FixedSubspace
    >>> from thalweg.optim.sam import SAM
    >>> from thalweg.optim.split import SplitUpdate
    >>> base = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    >>> frozen = FixedSubspace(Subspace(torch.eye(2)[:, :1], torch.ones(1)))
    >>> outer = SplitUpdate(SAM(base, rho=0.05), frozen, dominant=0.0)
    >>> found = unwrapped(outer)
    >>> found.base is base, found.rho, found.adaptive, found.needs_closure
    (True, 0.05, False, True)
    >>> outer in stepping(base)
    True
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch.optim import LBFGS, Optimizer

from thalweg.errors import invalid

_WRAPPERS: WeakKeyDictionary[Optimizer, WeakSet[Optimizer]] = WeakKeyDictionary()
"""The wrappers of Thalweg around each optimizer, those that are still in use."""


@dataclass(frozen=True)
class Unwrapped:
    """What a nest of wrapped optimizers comes to.

    Attributes:
        base: the innermost one, which makes the step.
        rho: radius of the perturbation at which the gradient is taken; 0 without SAM.
        adaptive: whether the perturbation is scaled by the parameters' sizes.
        needs_closure: whether `step` must be given a closure that evaluates the loss again: one of
            the nest is LBFGS, or says so by its attribute `needs_closure`.
    """

    base: Optimizer
    rho: float = 0.0
    adaptive: bool = False
    needs_closure: bool = False


def unwrapped(optimizer: Optimizer) -> Unwrapped:
    """Look through all wrappers around an optimizer; one that wraps none is its own base."""
    rho, adaptive, needs = 0.0, False, False
    for current in _inwards(optimizer):
        optimizer = current
        needs = needs or isinstance(current, LBFGS) or getattr(current, "needs_closure", False)
        if getattr(current, "base_optimizer", None) is not None:
            rho = float(_setting(current, "rho"))
            adaptive = bool(_setting(current, "adaptive"))
    return Unwrapped(optimizer, rho, adaptive, bool(needs))


def parts_of(optimizer: Optimizer) -> tuple[Optimizer, ...]:
    """The bases that step together as one: those of a `Combined`, or the base alone."""
    base = unwrapped(optimizer).base
    held = getattr(base, "optimizers", None)
    if not isinstance(held, tuple) or not all(isinstance(each, Optimizer) for each in held):
        return (base,)
    return tuple(unwrapped(each).base for each in held)


def needs_closure(optimizer: Optimizer) -> bool:
    """Whether `step` must be given a closure that evaluates the loss again, as by SAM and LBFGS.

    Example:
        >>> import torch
        >>> parameters = [torch.zeros(2, requires_grad=True)]
        >>> needs_closure(LBFGS(parameters)), needs_closure(torch.optim.SGD(parameters))
        (True, False)
    """
    return unwrapped(optimizer).needs_closure


def stepping(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizers by whose `step` an optimizer's parameters may be moved: it, and what wraps it.

    An object whose `step` runs no hooks of torch, as Accelerate's and Lightning's, is represented
    by the first one inside of it that does. Wrappers of other libraries around the optimizer are
    not known: hand over the outermost one.

    Raises:
        InvalidInput: no optimizer that runs hooks is in it.
    """
    inside = list(_inwards(optimizer, hidden=True))
    hooked = [number for number, each in enumerate(inside) if _runs_hooks(each)]
    if not hooked:
        raise invalid(
            "optimizer",
            type(optimizer).__name__,
            "an optimizer whose step runs hooks (its class calls Optimizer.__init__), or a wrapper"
            " that holds one",
            "give the torch.optim.Optimizer inside of it",
        )
    found = [inside[hooked[0]]]
    waiting = inside[: hooked[0] + 1]
    while waiting:
        for outer in _WRAPPERS.get(waiting.pop(), ()):
            waiting.append(outer)
            if outer not in found:
                found.append(outer)
    return found


def announce(outer: Optimizer, inner: Iterable[Optimizer]) -> None:
    """Make a wrapper known to what it wraps; whoever watches the steps of that follows it."""
    for each in inner:
        _WRAPPERS.setdefault(each, WeakSet()).add(outer)
        for hooked in (one for one in _inwards(each, hidden=True) if _runs_hooks(one)):
            for hook in list(hooked._optimizer_step_pre_hooks.values()):
                follow = getattr(getattr(hook, "__self__", None), "follow", None)
                if callable(follow):
                    follow(outer)


def held_by(optimizer: Optimizer) -> set[int]:
    """The identities of an optimizer's parameters."""
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def require_optimizer(what: str, given: Any) -> None:
    """Refuse what is no optimizer, such as a class or a list of parameters.

    Raises:
        InvalidInput: it has no groups of parameters, or cannot step.
    """
    members = ("param_groups", "state", "step", "zero_grad")
    if isinstance(given, type) or not all(hasattr(given, name) for name in members):
        named = f"the class {given.__name__}" if isinstance(given, type) else type(given).__name__
        raise invalid(
            what,
            named,
            "an optimizer that is built already",
            "such as torch.optim.SGD(model.parameters(), lr=0.1)",
        )


def _inwards(optimizer: Optimizer, *, hidden: bool = False) -> Iterator[Optimizer]:
    """An optimizer, what it wraps, and so on; `hidden` under a name of any kind too."""
    seen: set[int] = set()
    current: Optimizer | None = optimizer
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        names = ("base_optimizer", "optimizer", "_optimizer")
        # What it holds itself comes first: Lightning's asks the inner one for all that it has not.
        found = [vars(current).get(name) for name in names]
        found += [getattr(current, name, None) for name in names]
        inner = next((each for each in found if each is not None), None)
        if not isinstance(inner, Optimizer) and hidden:
            held = vars(current).values()
            inner = next((each for each in held if isinstance(each, Optimizer)), None)
        current = inner if isinstance(inner, Optimizer) else None


def _runs_hooks(optimizer: Optimizer) -> bool:
    """Whether torch has given it hooks of its own, and a step that runs them."""
    step = getattr(type(optimizer), "step", None)
    return hasattr(step, "hooked") and "_optimizer_step_pre_hooks" in vars(optimizer)


def _setting(optimizer: Optimizer, name: str) -> Any:
    """A setting of SAM: an attribute here, in the groups of parameters in the public code."""
    return getattr(optimizer, name, optimizer.param_groups[0].get(name, 0.0))
