"""Gradients of a model in shards as its trainer takes them: through its hooks, layer by layer.

What differences need of a model that does not fit one device even once (FSDP, with its gathering
and freeing of layers and the precision of its `MixedPrecisionPolicy`), and all that there is of one
whose layers are computed by several processes together (tensor parallel, where the gradient is
right, and the second derivative is not). The model's parameters hold the point's values for the
time of a pass. Unlike elsewhere processes exchange numbers inside of a pass. So all make equally
many: of FSDP one that has no more chunks repeats its last one without weight. And one that fails
inside of a pass is missed by the others, as in training: they wait for the group's timeout.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from thalweg.errors import InvalidInput
from thalweg.linalg import norm, require_finite
from thalweg.loss.cost import BACKWARD, FORWARD
from thalweg.loss.evaluation import refuse_constant
from thalweg.loss.guards.differences import random_like
from thalweg.loss.samples import Batch
from thalweg.loss.shards import (
    ParameterSharding,
    is_shard,
    local,
    own_part,
    take_back,
    write_part,
)

if TYPE_CHECKING:
    from thalweg.loss.objective import Objective

FAR = 0.2
"""A gradient off by this part of that of the loss is another one, whatever the precision."""
UNLIKE = 1e-2
"""Gradients of one parameter that are so far apart in two processes are not rounded otherwise."""


def parallel_value(
    objective: Objective, theta: Tensor | None, samples: Tensor | None, weight: float
) -> Tensor:
    """The mean loss at theta of a tensor parallel model, a scalar.

    Args:
        objective: of such a model.
        theta: this process's part of the point; None for the parameters as they are.
        samples, weight: as for `Objective.chunks`.
    """
    with _borrowed(objective, theta):
        return _pass(objective, samples, weight, backward=False)


def parallel_value_and_gradient(
    objective: Objective, theta: Tensor | None, samples: Tensor | None, weight: float
) -> tuple[Tensor, Tensor]:
    """The same and its gradient, this process's part of it (P_r,).

    Raises:
        InvalidInput: the loss depends on no parameter; or the gradient of one that each process
            holds whole is another one in each, looked at once, unless the loss has `check = False`.
    """
    with _borrowed(objective, theta):
        value = _pass(objective, samples, weight)
        found = _gradients(objective)
    if objective.check and not objective.wrapped_is_checked:
        _refuse_unlike(objective, found)
        objective.wrapped_is_checked = True
    return value, own_part(_sharding(objective), found).to(objective.dtype)


def wrapped_gradient(
    objective: Objective, theta: Tensor, samples: Tensor | None, weight: float
) -> Tensor:
    """The gradient of the mean loss at theta by FSDP, this process's part of it (P_r,).

    Args:
        objective: of a model in shards.
        theta: this process's part of the point.
        samples, weight: as for `Objective.chunks`.

    Raises:
        Diverged: it is NaN or infinite.
        InvalidInput: FSDP gives none, or one of another scale, as after
            `set_requires_gradient_sync(False)` or `set_gradient_divide_factor`; looked at once,
            unless the loss has `check = False`.
    """
    sharding = _sharding(objective)
    with _borrowed(objective, theta):
        # FSDP takes the mean over processes.
        _pass(objective, samples, weight, scale=sharding.ranks)
        if all(parameter.grad is None for parameter in objective.parameters()):
            raise InvalidInput(
                "model: FSDP gives no gradients: call set_requires_gradient_sync(True) before"
            )
        for parameter in objective.parameters():
            # Of those FSDP knows nothing: each process has the part of its own samples.
            if not is_shard(parameter):
                own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = objective.reduction.sum(own.detach() / sharding.ranks)
        gradient = own_part(sharding, _gradients(objective)).to(objective.dtype)
    require_finite(gradient, "the gradient")
    if objective.check and not objective.wrapped_is_checked:
        _refuse_other(objective, theta, samples, gradient)
        objective.wrapped_is_checked = True
    return gradient


def parallel_loss(objective: Objective, samples: Tensor) -> Tensor:
    """The loss of some samples of a tensor parallel model, with its graph."""
    ((batch, _, _, first), *_) = objective.chunks(samples, len(samples))
    evaluator = objective.evaluator
    with evaluator.settings(twice=False), evaluator.forward_precision():
        return evaluator.loss_through(batch, first)[1]


def _pass(
    objective: Objective,
    samples: Tensor | None,
    weight: float,
    *,
    scale: float = 1.0,
    backward: bool = True,
) -> Tensor:
    """The mean loss over this process's samples; leaves its gradient in the parameters.

    Args:
        scale: of the gradient.
    """
    evaluator = objective.evaluator
    total = torch.zeros((), dtype=objective.dtype, device=objective.device)
    for batch, count, fraction, first in _rounds(objective, samples, weight):
        objective.cost.add(count, FORWARD + BACKWARD if backward else FORWARD)
        with evaluator.settings(twice=False), evaluator.forward_precision():
            # With a graph in any case: without one torch and models may compute another function.
            _, loss = evaluator.loss_through(batch, first)
            refuse_constant(loss)
            if backward:
                (loss * (fraction * scale)).backward()
        total = total + fraction * loss.detach()
    return total


def _rounds(
    objective: Objective, samples: Tensor | None, weight: float
) -> Iterator[tuple[Batch, int, float, int]]:
    """Chunks with their sizes, weights in the mean and first samples, as many in all processes."""
    chunks = objective.chunks(samples, weight=weight)
    if objective.is_parallel:
        # All have the same.
        yield from chunks
        return
    batch, first = None, 0
    while True:
        with objective.reduction.together():
            found = next(chunks, None)
            if batch is None and found is None:
                batch = objective.first_batch()
        if not objective.reduction.anywhere(found is not None):
            return
        if found is not None:
            batch, count, fraction, first = found
        else:
            count, fraction = 0, 0.0
        assert batch is not None
        yield batch, count, fraction, first


def _gradients(objective: Objective) -> tuple[Tensor, ...]:
    parameters = objective.parameters()
    found = [None if p.grad is None else p.grad.detach() for p in parameters]
    return objective.evaluator.filled(found, [p.detach() for p in parameters])


@contextmanager
def _borrowed(objective: Objective, theta: Tensor | None) -> Iterator[None]:
    """The model's parameters hold theta; they, gradients and buffers are put back afterwards."""
    model, sharding = objective.model, _sharding(objective)
    parameters = objective.parameters()
    # By `data` the graphs that the user has do not see a change.
    there = [parameter.data for parameter in parameters]
    held = [] if theta is None else [local(each).clone() for each in there]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        if theta is not None:
            with torch.no_grad():
                write_part(sharding, there, theta)
        for parameter, _ in gradients:
            parameter.grad = None
        yield
    finally:
        take_back(model)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for each, value in zip(there if held else (), held, strict=True):
                local(each).copy_(value)
            for buffer, value in buffers:
                buffer.copy_(value)


def _refuse_other(
    objective: Objective, theta: Tensor, samples: Tensor | None, gradient: Tensor
) -> None:
    right = objective.value_and_gradient(theta, samples)[1]
    off, size = float(norm(gradient - right)), float(norm(right))
    if not off <= FAR * size:
        raise InvalidInput(
            f"model: the gradient that FSDP gives is {off / size:.0%} off that of the loss:"
            " set_gradient_divide_factor, or a hook? product='difference' needs no wrapper"
        )


def _refuse_unlike(objective: Objective, gradients: Sequence[Tensor]) -> None:
    """Refuse parameters that each process holds whole, with a gradient of its own in each."""
    sharding = _sharding(objective)
    named = zip(objective.layout.names, gradients, strict=True)
    whole = [(name, gradient) for name, gradient in named if not is_shard(gradient)]
    if not whole:
        return
    own = torch.stack(
        [torch.stack([g.norm(), (g * random_like(g, 0)).sum()]).double() for _, g in whole]
    )
    each = sharding.each(own)
    apart = (each - each[0]).abs().amax(dim=(0, 2))
    for (name, _), far, size in zip(whole, apart, each[:, :, 0].amax(0), strict=True):
        if not far <= UNLIKE * size:
            raise InvalidInput(
                f"parameter {name!r}: each process holds all of it, and has another gradient: that"
                " of its part of a layer's inputs? let the plan of parallelize_module have the"
                " layer (SequenceParallel), or its inputs be the same in all processes"
            )


def _sharding(objective: Objective) -> ParameterSharding:
    sharding = objective.layout.sharding
    assert isinstance(sharding, ParameterSharding)
    return sharding
