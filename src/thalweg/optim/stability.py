"""The sharpness at which full-batch training becomes unstable, for the optimizers of torch.

On a quadratic every optimizer below is a linear recurrence along each eigenvector, and it diverges
as soon as the largest eigenvalue exceeds a threshold that depends on its settings alone. Adam,
AdamW and RMSprop divide the gradient by a diagonal D: what counts for them is the *preconditioned*
sharpness, that of D^-1/2 H D^-1/2, see `preconditioned_sharpness`. Training at the edge of
stability hovers about these thresholds.

Source: Cohen et al. 2021 (arXiv 2103.00065) for gradient descent and momentum, 2022 (2207.14484)
for adaptive methods, Long and Bartlett 2024 (2309.12488) for SAM.

Example:
    >>> import torch
    >>> model = torch.nn.Linear(3, 1)
    >>> stability_threshold(torch.optim.SGD(model.parameters(), lr=0.1)).value
    20.0
    >>> adam = stability_threshold(torch.optim.Adam(model.parameters(), lr=0.001))
    >>> round(adam.value), adam.preconditioned
    (38000, True)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.optim import SGD, Adam, Optimizer, RMSprop

from thalweg.errors import InvalidInput, invalid
from thalweg.tracking.wrapping import parts_of, unwrapped

NO_THRESHOLD = {
    "Muon": "it makes updates of one size whatever the size of the gradient",
    "Rprop": "it goes by the sign of the gradient alone",
    "LBFGS": "it adapts to the curvature",
}


@dataclass(frozen=True)
class StabilityThreshold:
    """The largest sharpness at which an optimizer is stable, in units of the Hessian.

    Attributes:
        value: compare with lambda_1; None where there is none, `note` says why.
        preconditioned: compare with lambda_1 of D^-1/2 (H + shift I) D^-1/2 instead, D from
            `preconditioner`.
        shift: the weight decay that such an optimizer adds to the gradient. 0 otherwise: where
            nothing is preconditioned, `value` is lowered by it.
        note: what else to know; empty where there is nothing.
    """

    value: float | None
    preconditioned: bool = False
    shift: float = 0.0
    note: str = ""


def stability_threshold(
    optimizer: Optimizer,
    parameters: Iterable[Tensor] | None = None,
    *,
    lr: float | None = None,
) -> StabilityThreshold:
    """The sharpness above which full-batch training with an optimizer of torch is unstable.

    With beta the momentum (beta1 of Adam), d its dampening, w the weight decay:

    - `SGD`: 2 / lr - w; with momentum (2 + 2 beta) / (lr (1 - d)) - w; with Nesterov's
      (2 + 2 beta) / (lr (1 + 2 beta)) - w
    - `Adam`, in its own metric: (2 + 2 beta) / ((1 - beta) lr); `AdamW`, whose decay is apart from
      the gradient: (2 - lr w) (1 + beta) / ((1 - beta) lr)
    - `RMSprop`, in its own metric: (2 + 2 beta) / lr

    A subclass of one of these counts as it. D is taken as constant: it changes slowly against the
    oscillation that makes training unstable.

    Args:
        optimizer: any optimizer; of one that wraps another (`SplitUpdate`) the inner one counts, of
            a `Combined` its parts, as if each were a group.
        parameters: only parameter groups with one of these count; None for all.
        lr: learning rate to take in place of each group's own.

    Returns:
        The threshold. Where groups differ in learning rate or weight decay, the smallest one:
        training is stable below it, and may be so above. Without a value for other optimizers, a
        maximized objective, groups that differ in momentum, momentum >= 1 or dampening > 1.

    Raises:
        InvalidInput: no group holds any of `parameters`.
    """
    found = unwrapped(optimizer)
    threshold = _threshold_of(found.base, parameters, lr)
    if found.rho and threshold.value is not None:
        note = "SAM's threshold depends on the gradient: `sam_threshold`, or probe 'stability'"
        # Whatever the threshold, the metric is that of the optimizer inside.
        return replace(threshold, value=None, note=note)
    return threshold


def _threshold_of(
    optimizer: Optimizer, parameters: Iterable[Tensor] | None, lr: float | None
) -> StabilityThreshold:
    wanted = None if parameters is None else {id(p) for p in parameters}
    found: list[_Limit] = []
    for part in parts_of(optimizer):
        groups = [g for g in part.param_groups if wanted is None or _holds(g, wanted)]
        if not groups:
            continue
        formula = next((f for kind, f in _FORMULAS.items() if isinstance(part, kind)), None)
        if formula is None:
            name = type(part).__name__
            reason = NO_THRESHOLD.get(name, "none is known to Thalweg")
            return StabilityThreshold(None, note=f"{name} has no stability threshold: {reason}")
        if lr is not None:
            groups = [{**group, "lr": lr} for group in groups]
        if any(group["maximize"] for group in groups):
            note = "the optimizer maximizes: its Hessian is that of -L"
            return StabilityThreshold(None, note=note)
        found += [formula(group) for group in groups]
    if not found:
        raise InvalidInput("the optimizer updates none of the parameters; build both of one model")
    if len({limit.preconditioned for limit in found}) > 1:
        return StabilityThreshold(
            None, note="only a part of the parameters has a metric of its own"
        )
    if any(limit.value is None for limit in found):
        return StabilityThreshold(None, note="momentum >= 1 or dampening > 1 is never stable")
    if len({limit.recurrence for limit in found}) > 1:
        return StabilityThreshold(None, note="the parameter groups differ in their momentum")
    value = min(limit.value for limit in found if limit.value is not None)
    differ = len({(limit.value, limit.shift) for limit in found}) > 1
    return StabilityThreshold(
        value,
        found[0].preconditioned,
        max(limit.shift for limit in found),
        "the smallest of the parameter groups': stable below it" if differ else "",
    )


def edge_of_stability(optimizer: Optimizer, multiple: float = 1.0) -> Callable[[], float]:
    """A multiple of an optimizer's own stability threshold, as it is when asked: a threshold for
    `ThresholdSource`, which splits off what is beyond the edge.

    Args:
        optimizer: one that `stability_threshold` knows. Its threshold may be one in its own metric:
            give the source the same `optimizer` then.
        multiple: > 0.

    Returns:
        A function without arguments; it raises `InvalidInput` where there is no threshold.

    Raises:
        InvalidInput: a multiple that is not > 0; an optimizer without a threshold.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        >>> edge_of_stability(optimizer, 0.5)()
        10.0
    """
    if not multiple > 0:
        raise invalid("multiple", multiple, "a number > 0")

    def edge() -> float:
        found = stability_threshold(optimizer)
        if found.value is None:
            raise InvalidInput(f"edge of stability: {found.note}")
        return multiple * found.value

    edge()
    return edge


def sam_threshold(gradient_norm: float, lr: float, rho: float) -> float:
    """The sharpness at which sharpness-aware minimization (SAM) overshoots.

    lambda* = norm(g) / (2 rho) (sqrt(1 + 8 rho / (lr norm(g))) - 1), at which
    lr lambda (1 + rho lambda / norm(g)) = 2. It falls with the gradient: SAM finds minima that are
    flatter than 2 / lr, its limit at rho = 0.

    Args:
        gradient_norm: norm(g) of the full loss at theta, not at the perturbed point; >= 0.
        lr: learning rate, > 0.
        rho: radius of the perturbation rho g / norm(g), >= 0.

    Raises:
        InvalidInput: a number out of its range.

    Source: Long and Bartlett 2024 (arXiv 2309.12488).
    """
    if not lr > 0:
        raise invalid("lr", lr, "a number > 0")
    if not rho >= 0:
        raise invalid("rho", rho, "a number >= 0")
    if not gradient_norm >= 0:
        raise invalid("gradient_norm", gradient_norm, "a number >= 0")
    if rho == 0:
        return 2 / lr
    if gradient_norm == 0:
        return 0.0
    # The difference of the formula cancels where rho is small; its conjugate does not.
    return 4 / lr / (1 + math.sqrt(1 + 8 * rho / (lr * gradient_norm)))


@dataclass(frozen=True)
class _Limit:
    """The threshold of one parameter group.

    Where groups share their `recurrence`, the condition is on a symmetric matrix,
    H < diag(value of each parameter's group), which the smallest value implies.
    """

    value: float | None
    recurrence: tuple[object, ...]
    preconditioned: bool = False
    shift: float = 0.0


def _sgd_limit(group: Mapping[str, Any]) -> _Limit:
    momentum, nesterov = float(group["momentum"]), bool(group["nesterov"])
    # torch ignores the dampening where there is no momentum.
    dampening = float(group["dampening"]) if momentum else 0.0
    if momentum >= 1 or dampening > 1:
        return _Limit(None, ())
    factor = (2 + 2 * momentum) / (1 + 2 * momentum if nesterov else 1)
    value = _per_lr(factor, float(group["lr"]) * (1 - dampening)) - float(group["weight_decay"])
    return _Limit(value, (momentum, nesterov))


def _adam_limit(group: Mapping[str, Any]) -> _Limit:
    beta, lr, decay = (float(x) for x in (group["betas"][0], group["lr"], group["weight_decay"]))
    decoupled = bool(group.get("decoupled_weight_decay", False))
    factor = (2 - lr * decay if decoupled else 2) * (1 + beta) / (1 - beta)
    return _Limit(_per_lr(factor, lr), ("Adam", beta), True, 0.0 if decoupled else decay)


def _rmsprop_limit(group: Mapping[str, Any]) -> _Limit:
    momentum = float(group["momentum"])
    if momentum >= 1:
        return _Limit(None, ())
    value = _per_lr(2 + 2 * momentum, float(group["lr"]))
    return _Limit(value, ("RMSprop", momentum), True, float(group["weight_decay"]))


_FORMULAS: dict[type[Optimizer], Callable[[Mapping[str, Any]], _Limit]] = {
    SGD: _sgd_limit,
    # AdamW among them: a subclass.
    Adam: _adam_limit,
    RMSprop: _rmsprop_limit,
}


def _per_lr(factor: float, lr: float) -> float:
    return factor / lr if lr else math.inf


def _holds(group: Mapping[str, Any], wanted: set[int]) -> bool:
    return any(id(p) in wanted for p in group["params"])
