"""Which optimizer is inside of those that wrap another, and is sharpness-aware minimization on it?

A wrapper is known by the attribute that holds what it wraps: `optimizer`, as in `SplitUpdate`, or
`base_optimizer` beside `rho`, as in `SAM` and in the common public code.

Example:
    >>> import torch
    >>> from thalweg.spectrum.subspace import Subspace
    >>> from thalweg.tracking.source import FixedSubspace
    >>> from thalweg.optim.sam import SAM
    >>> from thalweg.optim.split import SplitUpdate
    >>> base = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    >>> frozen = FixedSubspace(Subspace(torch.eye(2)[:, :1], torch.ones(1)))
    >>> found = unwrapped(SplitUpdate(SAM(base, rho=0.05), frozen, dominant=0.0))
    >>> found.base is base, found.rho, found.adaptive
    (True, 0.05, False)
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.optim import Optimizer


@dataclass(frozen=True)
class Unwrapped:
    """What a nest of wrapped optimizers comes to.

    Attributes:
        base: the innermost one, which makes the step.
        rho: radius of the perturbation at which the gradient is taken; 0 without SAM.
        adaptive: whether the perturbation is scaled by the parameters' sizes.
    """

    base: Optimizer
    rho: float = 0.0
    adaptive: bool = False


def unwrapped(optimizer: Optimizer) -> Unwrapped:
    """The optimizer inside of all that wrap it; itself where it wraps none."""
    rho, adaptive = 0.0, False
    while True:
        inner = getattr(optimizer, "base_optimizer", None)
        if inner is not None:
            rho = float(getattr(optimizer, "rho", 0.0))
            adaptive = bool(getattr(optimizer, "adaptive", False))
        else:
            inner = getattr(optimizer, "optimizer", None)
        if not isinstance(inner, Optimizer):
            return Unwrapped(optimizer, rho, adaptive)
        optimizer = inner
