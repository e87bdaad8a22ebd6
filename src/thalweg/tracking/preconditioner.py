"""The diagonal by which an adaptive optimizer divides: the metric in which it sees the Hessian.

Source: Cohen et al. 2022 (arXiv 2207.14484).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Adam, Optimizer, RMSprop

from thalweg.errors import InvalidInput, invalid
from thalweg.linalg import anywhere
from thalweg.loss.layout import flat
from thalweg.loss.protocol import Loss
from thalweg.loss.shards import sharding_of_parameters
from thalweg.sharding import plain
from thalweg.tracking.wrapping import parts_of


def preconditioner(optimizer: Optimizer, parameters: Iterable[Tensor] | None = None) -> Tensor:
    """D, the diagonal by which Adam, AdamW or RMSprop divided at its last step, (P,).

    The update is -lr m / D, apart from AdamW's decay, where m is the moving average of gradients
    that the optimizer keeps (for RMSprop the gradient). Adam: (1 - beta1^t) (sqrt(v_hat) + eps),
    v_hat the second moment corrected for its bias (its maximum with `amsgrad`) and t the number of
    steps; the first factor corrects m and is soon 1. RMSprop: sqrt(v) + eps, v the variance where
    it is centered.

    Args:
        optimizer: one that has made a step, or that wraps such a one; a `Combined` of them.
        parameters: in the order of theta, such as `objective.parameters()`; None for
            all of the optimizer's.

    Returns:
        A new vector of the dtype and device of the parameters.

    Raises:
        InvalidInput: the optimizer has no such diagonal, or none yet for one of the parameters.

    Source: Cohen et al. 2022 (arXiv 2207.14484).
    """
    require_preconditioner(optimizer)
    held_by = {
        id(p): (part, group)
        for part in parts_of(optimizer)
        for group in part.param_groups
        for p in group["params"]
    }
    if parameters is None:
        parameters = (p for group in optimizer.param_groups for p in group["params"])
    parameters = [*parameters]
    parts: list[Tensor] = []
    for number, parameter in enumerate(parameters):
        shape = tuple(parameter.shape)
        if id(parameter) not in held_by:
            raise invalid(f"parameter {number}", shape, "one that the optimizer updates")
        part, group = held_by[id(parameter)]
        state = part.state.get(parameter)
        if not state:
            raise InvalidInput(
                f"parameter {number}, {shape}: the optimizer has no second moment of it yet; make"
                " a step in which it has a gradient"
            )
        diagonal = _adam_diagonal if isinstance(part, Adam) else _rmsprop_diagonal
        parts.append(diagonal(state, group).detach())
    return flat(parts, sharding_of_parameters(parameters))


def has_preconditioner(optimizer: Optimizer) -> bool:
    """Whether `preconditioner` knows the diagonal of this kind of optimizer, wrapped or not."""
    return all(isinstance(part, (Adam, RMSprop)) for part in parts_of(optimizer))


def require_preconditioner(optimizer: Optimizer) -> None:
    """Refuse an optimizer without a diagonal that `preconditioner` knows.

    Raises:
        InvalidInput: it is neither Adam, AdamW nor RMSprop, nor wraps one of them.
    """
    if not has_preconditioner(optimizer):
        unknown = (part for part in parts_of(optimizer) if not has_preconditioner(part))
        name = type(next(unknown)).__name__
        raise invalid("optimizer", name, "Adam, AdamW or RMSprop")


def metric_of(optimizer: Optimizer, objective: Loss) -> tuple[Tensor, float]:
    """The metric of an optimizer over the parameters of a loss: D (P,), and w.

    D is from `preconditioner`, w the weight decay that Adam or RMSprop adds to the gradient: what
    the optimizer feels is D^-1/2 (H + w I) D^-1/2.

    Args:
        optimizer: Adam, AdamW or RMSprop after a step, or what wraps one of them.

    Raises:
        InvalidInput: the optimizer has no preconditioner, or none yet; it holds a zero.
    """
    parameters = objective.parameters()
    diagonal = preconditioner(optimizer, parameters)
    if anywhere(~(diagonal > 0)):
        raise invalid(
            "preconditioner", float(plain(diagonal).min()), "positive numbers", "raise eps"
        )
    return diagonal, coupled_decay(optimizer, parameters)


def _adam_diagonal(state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    beta1, beta2 = (float(beta) for beta in group["betas"])
    step = float(state["step"])
    second = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
    root = second.sqrt() / (1 - beta2**step) ** 0.5
    return (root + group["eps"]) * (1 - beta1**step)


def _rmsprop_diagonal(state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    second = state["square_avg"]
    if group["centered"]:
        second = second - state["grad_avg"].square()
    return second.sqrt() + group["eps"]


def coupled_decay(optimizer: Optimizer, parameters: Iterable[Tensor]) -> float:
    """The weight decay that Adam or RMSprop adds to the gradient, the largest of its groups.

    0 for AdamW, whose decay is apart from the gradient.
    """
    wanted = {id(p) for p in parameters}
    groups = [g for g in optimizer.param_groups if any(id(p) in wanted for p in g["params"])]
    decays = [
        0.0 if group.get("decoupled_weight_decay", False) else float(group["weight_decay"])
        for group in groups
    ]
    return max(decays)
