"""The update that an optimizer would make now, without making it.

Example:
    >>> import torch
    >>> from thalweg.loss.function_loss import FunctionLoss
    >>> theta = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    >>> loss = FunctionLoss(lambda t: (t * t).sum(), theta)
    >>> optimizer = torch.optim.SGD([theta], lr=0.1, momentum=0.9)
    >>> proposed_update(optimizer, loss), theta.grad, len(optimizer.state)
    (tensor([-0.2000, -0.4000]), None, 0)
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from thalweg.errors import InvalidInput, invalid
from thalweg.loss.layout import flat
from thalweg.loss.protocol import Loss
from thalweg.loss.shards import sharding_of_parameters
from thalweg.tracking.wrapping import held_by, unwrapped


def proposed_update(optimizer: Optimizer, objective: Loss) -> Tensor:
    """The update of the next step, (P,): that of a copy of the optimizer.

    By the gradients that the parameters hold, or by the objective's where none holds any. Hooks and
    schedulers do not see the step. Of an optimizer that wraps another it is what the inner one
    proposes. It takes the memory of parameters, gradients and state once more.

    Args:
        optimizer: any of torch; those of its parameters that are not theta's are left out, and
            those of theta's that it does not hold do not move.
        objective: the loss whose parameters make up theta.

    Raises:
        InvalidInput: the optimizer needs a closure, cannot be copied, or holds no parameter of
            theta.
    """
    found = unwrapped(optimizer)
    if found.needs_closure:
        hint = "make the step, and give its update: critical_sharpness_along(loss, update, lr)"
        raise invalid("optimizer", type(found.base).__name__, "one that needs no closure", hint)
    theta = list(objective.parameters())
    memo: dict[int, Any] = {}
    try:
        copied = copy.deepcopy(found.base, memo)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise InvalidInput(
            f"optimizer: {type(found.base).__name__} cannot be copied: {error}"
        ) from error
    held = held_by(found.base)
    if not any(id(p) in held for p in theta):
        raise InvalidInput("optimizer: it updates none of the parameters of the loss")
    moving = [memo[id(p)] if id(p) in held else p for p in theta]
    _give_gradients(memo, found.base, objective)
    before = objective.theta()
    copied.step()
    after = flat([each.detach() for each in moving], sharding_of_parameters(theta))
    return after.to(before.dtype) - before


def largest_learning_rate(optimizer: Optimizer, parameters: Sequence[Tensor]) -> float:
    """The largest learning rate of the groups that hold some of the parameters.

    Raises:
        InvalidInput: none of them is positive and finite.
    """
    wanted = {id(p) for p in parameters}
    groups = [g for g in optimizer.param_groups if any(id(p) in wanted for p in g["params"])]
    rates = [float(group["lr"]) for group in groups if group.get("lr") is not None]
    largest = max(rates, default=0.0)
    if not 0 < largest < math.inf:
        raise invalid("lr of the optimizer", largest, "a finite number > 0")
    return largest


def _give_gradients(memo: Mapping[int, Any], optimizer: Optimizer, objective: Loss) -> None:
    """Give the copies the gradients of what they are copies of, or that of the objective."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = {id(p): p.grad for p in held}
    theta = list(objective.parameters())
    if all(p.grad is None for p in theta):
        gradient = objective.value_and_gradient()[1]
        parts = gradient.split([p.numel() for p in theta])
        pairs = zip(theta, parts, strict=True)
        gradients |= {id(p): part.reshape(p.shape).to(p.dtype) for p, part in pairs}
    for parameter in held:
        given = gradients[id(parameter)]
        memo[id(parameter)].grad = None if given is None else given.detach().clone()
