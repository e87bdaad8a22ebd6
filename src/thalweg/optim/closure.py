"""Which optimizers cannot step without a closure that evaluates the loss again?

Example:
    >>> import torch
    >>> parameters = [torch.zeros(2, requires_grad=True)]
    >>> needs_closure(torch.optim.LBFGS(parameters)), needs_closure(torch.optim.SGD(parameters))
    (True, False)
"""

from __future__ import annotations

from torch.optim import LBFGS, Optimizer


def needs_closure(optimizer: Optimizer) -> bool:
    """Whether `step` must be given a closure: LBFGS, and what says so by its `needs_closure`."""
    return isinstance(optimizer, LBFGS) or bool(getattr(optimizer, "needs_closure", False))
