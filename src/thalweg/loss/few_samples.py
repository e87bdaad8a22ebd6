"""A loss over a few of its samples, in a copy of its model: what checks are made on.

The copy is in float64 where the model allows it, so that a difference of gradients says something;
its samples are few, so that a check costs little.

Example:
    >>> import torch
    >>> model, data = torch.nn.Linear(3, 2), (torch.randn(80, 3), torch.randn(80, 2))
    >>> few = copied(Objective(model, torch.nn.MSELoss(), data), few_of(80), torch.float64)
    >>> few.num_samples, few.dtype
    (4, torch.float64)
"""

from __future__ import annotations

import copy
import functools
import glob
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from thalweg.errors import InvalidInput
from thalweg.loss.function_loss import FunctionLoss
from thalweg.loss.guards.held_constants import HeldConstants
from thalweg.loss.objective import Objective
from thalweg.loss.protocol import Loss
from thalweg.loss.weighting import is_torch_loss

FEW = 4
MOST_COPIED = 2**25
"""Numbers in the largest model that is copied: 256 MiB in float64."""


def few_of(count: int, few: int = FEW) -> Tensor:
    """The indices of a few of so many samples, spread evenly, int64."""
    return torch.linspace(0, count - 1, min(few, count), device="cpu").round().long()


def copied(
    loss: Loss, samples: Tensor, dtype: torch.dtype, held: HeldConstants | None = None
) -> Loss:
    """The loss over some samples, of a copy of its model in another dtype.

    Args:
        loss: an `Objective` or `FunctionLoss`.
        samples: indices of this process's samples, int64.
        dtype: of the copy's parameters, buffers and data.
        held: holds the constants that model and loss take out of the graph.

    Raises:
        InvalidInput: another kind of loss, or a model of more than `MOST_COPIED` numbers.
        Exception: whatever the model raises where it cannot be copied.
    """
    if isinstance(loss, FunctionLoss):
        return loss.copied(dtype, (lambda f: f) if held is None else held.around)
    if not isinstance(loss, Objective):
        raise InvalidInput(f"{type(loss).__name__} cannot be copied")
    model = loss.model
    tensors = [*model.parameters(), *model.buffers()]
    if sum(tensor.numel() for tensor in tensors) > MOST_COPIED:
        raise InvalidInput("the model is too large to be copied")
    evaluator = loss.evaluator
    model = copy.deepcopy(model, _computed(model)).to(dtype)
    function = _in(evaluator.loss, dtype)
    if held is not None:
        model.forward = held.around(model.forward)  # type: ignore[method-assign]
        if function is not None and not is_torch_loss(function):
            function = held.around(function)
    batches = [
        tree_map(lambda leaf: _in(leaf, dtype), batch)
        for batch, _ in loss.samples.chunks(samples, loss.chunk_size)
    ]
    return Objective(
        model,
        function,
        batches,
        parameters=[glob.escape(name) for name in loss.layout.names],
        batch_weight=loss.batch_weight,
        chunk_size=loss.chunk_size,
        mode="eval" if evaluator.mode == "eval" else None,
        group=None,
        check=False,
    )


def unchecked(loss: Loss) -> Loss:
    """The same loss without a check of its own; a bare `Loss` as it is."""
    if not isinstance(loss, (Objective, FunctionLoss)):
        return loss
    plain = copy.copy(loss)
    plain.check = False
    return plain


def _computed(model: nn.Module) -> dict[int, Any]:
    """Copies of tensors that modules hold with a graph, which `deepcopy` refuses, by identity."""
    held = (value for module in model.modules() for value in vars(module).values())
    return {
        id(value): value.detach().clone()
        for value in held
        if isinstance(value, Tensor) and not value.is_leaf
    }


def _in(value: Any, dtype: torch.dtype) -> Any:
    """The floating-point numbers of a tensor, a module or a partial function in another dtype."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).to(dtype)
    if isinstance(value, functools.partial):
        keywords = {name: _in(part, dtype) for name, part in value.keywords.items()}
        return functools.partial(value.func, *value.args, **keywords)
    return value
