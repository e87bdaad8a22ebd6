"""An optimizer that is saved and restored goes on as if nothing had happened, to the last bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn
from torch.nn.utils import parameters_to_vector
from torch.optim import Optimizer

AnOptimizer = TypeVar("AnOptimizer", bound=Optimizer)


def save_and_restore(
    build: Callable[[], tuple[nn.Module, AnOptimizer]],
    step: Callable[[nn.Module, AnOptimizer, int], object],
    *,
    saved_after: int = 4,
    steps: int = 8,
) -> tuple[AnOptimizer, AnOptimizer]:
    """Train on from what was saved, and beside it without a break: both end at the same place.

    Args:
        build: a fresh model and its optimizer.
        step: makes the step of a number, gradients included.

    Returns:
        The optimizer that went on, and the restored one.
    """
    (model, optimizer), (resumed, restored) = build(), build()
    for number in range(saved_after):
        step(model, optimizer, number)
    begin = parameters_to_vector(model.parameters()).clone()
    resumed.load_state_dict(model.state_dict())
    # torch shares tensors between the optimizers otherwise.
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for number in range(saved_after, steps):
        step(model, optimizer, number)
        step(resumed, restored, number)
    ends = [parameters_to_vector(m.parameters()) for m in (model, resumed)]
    assert torch.equal(*ends)
    assert not torch.equal(begin, ends[0])
    return optimizer, restored
