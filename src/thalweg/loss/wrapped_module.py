"""Gradients of a model in shards as its trainer takes them: through FSDP's hooks, layer by layer.

What differences need of a model that does not fit one device even once. Its parameters hold the
point's values for the time of a pass; FSDP gathers and frees them as in training, in the precision
of its `MixedPrecisionPolicy`. Unlike elsewhere processes exchange parameters inside of a pass. So
all make equally many: one that has no more chunks repeats its last one without weight. And one that
fails inside of a pass is missed by the others, as in training: they wait for the group's timeout.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from thalweg.errors import InvalidInput
from thalweg.linalg import norm, require_finite
from thalweg.loss.samples import Batch
from thalweg.loss.shards import is_shard, own_part, take_back, write_part

if TYPE_CHECKING:
    from thalweg.loss.objective import Objective

FAR = 0.2
"""A gradient off by this part of that of the loss is another one, whatever the precision."""


def wrapped_gradient(
    objective: Objective, theta: Tensor, samples: Tensor | None, weight: float
) -> Tensor:
    """The gradient of the mean loss at theta, this process's part of it (P_r,).

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
    sharding, reduction = objective.sharding, objective.reduction
    assert sharding is not None
    parameters = objective.parameters()
    with _borrowed(objective, theta):
        ranks = sharding.ranks
        for batch, fraction, first in _rounds(objective, samples, weight):
            evaluator = objective.evaluator
            with evaluator.settings(twice=False), evaluator.forward_precision():
                _, loss = evaluator.loss_through(batch, first)
                # FSDP takes the mean over processes.
                (loss * (fraction * ranks)).backward()
        if all(parameter.grad is None for parameter in parameters):
            raise InvalidInput(
                "model: FSDP gives no gradients: call set_requires_gradient_sync(True) before"
            )
        whole = [parameter for parameter in parameters if not is_shard(parameter)]
        for parameter in whole:
            # Of those FSDP knows nothing: each process has the part of its own samples.
            own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = reduction.sum(own.detach() / ranks)
        found = [torch.zeros_like(p) if p.grad is None else p.grad.detach() for p in parameters]
        gradient = own_part(sharding, found).to(objective.dtype)
    require_finite(gradient, "the gradient")
    if objective.check and not objective.wrapped_is_checked:
        _refuse_other(objective, theta, samples, gradient)
        objective.wrapped_is_checked = True
    return gradient


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


@contextmanager
def _borrowed(objective: Objective, theta: Tensor) -> Iterator[None]:
    """The model's parameters hold theta; they, gradients and buffers are put back afterwards."""
    model, parameters, sharding = objective.model, objective.parameters(), objective.sharding
    assert sharding is not None
    held = own_part(sharding, parameters)
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with torch.no_grad():
            write_part(sharding, parameters, theta.to(held.dtype))
        for parameter, _ in gradients:
            parameter.grad = None
        yield
    finally:
        take_back(model)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            write_part(sharding, parameters, held)
            for buffer, value in buffers:
                buffer.copy_(value)


def _rounds(
    objective: Objective, samples: Tensor | None, weight: float
) -> Iterator[tuple[Batch, float, int]]:
    """Chunks with their weights in the mean and their first samples, as many in all processes."""
    chunks = objective.chunks(samples, weight=weight)
    batch, first = None, 0
    while True:
        with objective.reduction.together():
            found = next(chunks, None)
            if batch is None and found is None:
                batch = objective.first_batch()
        if not objective.reduction.total(float(found is not None)):
            return
        if found is not None:
            batch, _, fraction, first = found
        else:
            fraction = 0.0
        assert batch is not None
        yield batch, fraction, first
