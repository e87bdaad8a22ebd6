"""Closures whose loss a gradient scaler has scaled: their gradients are brought back to its scale.

`GradScaler.step` unscales the gradients before it calls an optimizer's `step`, and knows nothing of
those that a closure computes inside of it.

Example:
    >>> import torch
    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    >>> def closure():
    ...     weight.grad = None
    ...     loss = weight.sum()
    ...     scaler.scale(loss).backward()
    ...     return loss.detach()
    >>> evaluate(closure, [weight])
    (tensor(2.), True)
    >>> weight.grad
    tensor([1., 1.])
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from thalweg.errors import InvalidInput


def evaluate(closure: Callable[[], Any], parameters: Sequence[Tensor]) -> tuple[Any, bool]:
    """Call a closure, and divide the gradients by the scale of a scaler that it has used.

    Returns:
        What the closure returned, and whether the gradients are finite: False only where a scaler
        was used, which is told either way, so that its next update lowers the scale.

    Raises:
        InvalidInput: the closure has used two scalers.
    """
    with torch.enable_grad(), _scalers_used() as used:
        result = closure()
    if not used:
        return result, True
    if len(used) > 1:
        raise InvalidInput(
            "closure: its loss was scaled by more than one GradScaler; use one for each optimizer"
        )
    scaler = next(iter(used.values()))
    with torch.no_grad():
        gradients = [p.grad for p in parameters if p.grad is not None]
        for gradient in gradients:
            gradient.mul_(1 / scaler.get_scale())
        finite = all(bool(torch.isfinite(_values(g)).all()) for g in gradients)
        if gradients:
            _tell(scaler, gradients[0].device, finite)
    return result, finite


@contextmanager
def _scalers_used() -> Iterator[dict[int, GradScaler]]:
    """Those whose `scale` this thread has called within the block, unless they unscaled again."""
    used: dict[int, GradScaler] = {}
    thread = threading.get_ident()
    replaced: list[tuple[type, str, Any]] = []

    def noting(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def noted(scaler: GradScaler, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == thread and scaler.is_enabled():
                if name == "scale":
                    used[id(scaler)] = scaler
                else:
                    used.pop(id(scaler), None)
            return method(scaler, *args, **kwargs)

        return noted

    for kind in _with_subclasses(GradScaler):
        for name in ("scale", "unscale_"):
            if name in vars(kind):
                replaced.append((kind, name, vars(kind)[name]))
                setattr(kind, name, noting(name, vars(kind)[name]))
    try:
        yield used
    finally:
        for kind, name, method in replaced:
            setattr(kind, name, method)


def _with_subclasses(kind: type) -> Iterator[type]:
    yield kind
    for derived in kind.__subclasses__():
        yield from _with_subclasses(derived)


def _values(gradient: Tensor) -> Tensor:
    return gradient._values() if gradient.layout == torch.sparse_coo else gradient


def _tell(scaler: GradScaler, device: torch.device, finite: bool) -> None:
    """Let the scaler's next update know, as after a step of its own; there is no public way to."""
    states = getattr(scaler, "_per_optimizer_states", None)
    if states is not None:
        found = torch.full((), 0.0 if finite else 1.0, device=device)
        # An entry of its own: the state of no optimizer changes.
        states[id(_tell)]["found_inf_per_device"] = {device: found}
