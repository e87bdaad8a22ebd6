"""A loss and its gradient by torch alone, of the model's own parameters; and what a pass leaves.

Nothing of how an `Objective` evaluates stands between: neither chunks nor other tensors in the
places of the parameters. The parameters themselves hold the values of a point for the moment of the
pass, and are put back to the last bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_flatten, tree_map

from thalweg.loss.evaluation import LossOfBatch
from thalweg.loss.guards.generators import States
from thalweg.loss.objective import Objective
from thalweg.loss.protocol import Loss
from thalweg.loss.swapped import Overwritten, Swapped


@dataclass(frozen=True)
class Plain:
    """What came out of it.

    Attributes:
        value: the mean loss.
        gradients: of each parameter in theta, in their own dtypes; None where it is not used.
        inputs: the entries of a batch that the forward pass has written into.
        buffers: the names of those that it has changed.
    """

    value: float
    gradients: tuple[Tensor | None, ...]
    inputs: tuple[str, ...]
    buffers: tuple[str, ...]


def plain_evaluation(objective: Objective, theta: Tensor, samples: Tensor) -> Plain:
    """Evaluate a loss at theta (P,) over some samples, int64 (n,).

    Args:
        objective: the loss, without checks of its own.

    Raises:
        Exception: whatever the model raises.
    """
    evaluator, model = objective.evaluator, objective.model
    parameters = objective.parameters()
    pieces = [piece.detach().clone() for piece in evaluator.pieces(theta)]
    before = dict(model.named_buffers())
    function = LossOfBatch(model, evaluator.loss)
    total, sums = 0.0, [None] * len(parameters)
    written: dict[str, None] = {}
    changed: dict[str, None] = {}
    for batch, _, fraction, first in objective.chunks(samples):
        given = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, batch)
        at = Swapped(
            model, Overwritten(parameters, pieces), evaluator.settings, low=evaluator.is_low
        )
        with at, torch.enable_grad():
            with evaluator.random_numbers(first):
                _, loss = function(given)
            changed |= dict.fromkeys(
                name for name, b in model.named_buffers() if not _equal(b, before.get(name))
            )
            with torch._C.DisableTorchFunction():
                end = get_gradient_edge(loss)
                starts = [get_gradient_edge(parameter) for parameter in parameters]
            parts = torch.autograd.grad([end], starts, [torch.ones_like(loss)], allow_unused=True)
        written |= dict.fromkeys(_differing(given, batch))
        total += fraction * float(loss.detach())
        sums = [_added(old, part, fraction) for old, part in zip(sums, parts, strict=True)]
    return Plain(total, tuple(sums), tuple(written), tuple(changed))


class Trace:
    """What is to be as before, whatever was evaluated meanwhile: see `changed`."""

    def __init__(self, loss: Loss) -> None:
        self._loss = loss
        self._states = States(loss.device)
        self._held = _held(loss)
        self._copies = {name: _copy(value) for name, value in self._held.items()}

    def changed(self) -> list[str]:
        """The names of what is not as it was when this was made."""
        now = _held(self._loss)
        names = [
            name
            for name in {**self._held, **now}
            if now.get(name) is not self._held.get(name) or not _same(now, self._copies, name)
        ]
        drawn = self._states.moved()
        return names + ([f"the generator of {drawn}"] if drawn else [])


def _held(loss: Loss) -> dict[str, Any]:
    """Parameters, their gradients, buffers, tensors that modules hold besides, and modes."""
    if not isinstance(loss, Objective):
        return {f"parameter {i}": p for i, p in enumerate(loss.parameters())}
    found: dict[str, Any] = {}
    for name, parameter in loss.model.named_parameters():
        found[f"parameter {name!r}"] = parameter
        found[f"the gradient of {name!r}"] = parameter.grad
    found |= {f"buffer {name!r}": buffer for name, buffer in loss.model.named_buffers()}
    for name, module in loss.model.named_modules():
        where = f"of {name!r}" if name else "of the model"
        found[f"mode {where}"] = module.training
        if isinstance(module, torch.jit.ScriptModule):
            continue
        kept = {k: v for k, v in vars(module).items() if isinstance(v, Tensor)}
        found |= {f"attribute {key!r} {where}": value for key, value in kept.items()}
    return found


def _copy(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return (value.to_dense() if value.layout != torch.strided else value).detach().clone()


def _same(now: dict[str, Any], before: dict[str, Any], name: str) -> bool:
    first, second = now.get(name), before.get(name)
    if isinstance(first, Tensor):
        return _equal(_copy(first), second)
    return first is second


def _equal(first: Tensor, second: Tensor | None) -> bool:
    if second is None or first.shape != second.shape:
        return False
    second = second.to(first.dtype)
    return bool(((first == second) | (first.isnan() & second.isnan())).all())


def _differing(given: Any, batch: Any) -> list[str]:
    """The entries of a batch that differ: by name, or by their number."""
    names = list(batch) if isinstance(batch, Mapping) else [str(i) for i in range(len(batch))]
    pairs = zip(names, given.values() if isinstance(given, Mapping) else given, strict=True)
    whole = dict(zip(names, batch.values() if isinstance(batch, Mapping) else batch, strict=True))
    return [repr(name) for name, part in pairs if not _all_equal(part, whole[name])]


def _all_equal(first: Any, second: Any) -> bool:
    pairs = zip(tree_flatten(first)[0], tree_flatten(second)[0], strict=True)
    return all(_equal(a, b) for a, b in pairs if isinstance(a, Tensor))


def _added(old: Tensor | None, part: Tensor | None, fraction: float) -> Tensor | None:
    if part is None:
        return old
    part = fraction * (part.to_dense() if part.layout != torch.strided else part).detach()
    return part if old is None else old + part


def named_parameters(objective: Objective) -> list[tuple[str, nn.Parameter]]:
    """Those that make up theta, with their names."""
    return list(zip(objective.layout.names, objective.parameters(), strict=True))
