"""Optimizers that wrap others: which one makes the step, and what is done around it.

A wrapper is known by the attribute that holds what it wraps: `optimizer`, as in `SplitUpdate` and
in other libraries, or `base_optimizer` beside `rho`, as in `SAM` and in the common public code.

Example:
    >>> import torch
    >>> from thalweg.spectrum.subspace import Subspace
    >>> from thalweg.tracking.source import FixedSubspace
    >>> from thalweg.optim.sam import SAM
    >>> from thalweg.optim.split import SplitUpdate
    >>> base = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    >>> frozen = FixedSubspace(Subspace(torch.eye(2)[:, :1], torch.ones(1)))
    >>> found = unwrapped(SplitUpdate(SAM(base, rho=0.05), frozen, dominant=0.0))
    >>> found.base is base, found.rho, found.adaptive, found.needs_closure
    (True, 0.05, False, True)
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.optim import LBFGS, Optimizer


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
    while True:
        needs = needs or isinstance(optimizer, LBFGS) or getattr(optimizer, "needs_closure", False)
        inner = getattr(optimizer, "base_optimizer", None)
        if inner is not None:
            rho = float(getattr(optimizer, "rho", 0.0))
            adaptive = bool(getattr(optimizer, "adaptive", False))
        else:
            inner = getattr(optimizer, "optimizer", None)
        if not isinstance(inner, Optimizer):
            return Unwrapped(optimizer, rho, adaptive, bool(needs))
        optimizer = inner


def needs_closure(optimizer: Optimizer) -> bool:
    """Whether `step` must be given a closure that evaluates the loss again, as by SAM and LBFGS.

    Example:
        >>> import torch
        >>> parameters = [torch.zeros(2, requires_grad=True)]
        >>> needs_closure(LBFGS(parameters)), needs_closure(torch.optim.SGD(parameters))
        (True, False)
    """
    return unwrapped(optimizer).needs_closure
