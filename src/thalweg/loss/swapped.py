"""A model at a point: the point's tensors stand in its parameters' places while a pass lasts.

A backward pass may run parts of the forward pass again: activation checkpointing does, and so may
any hook or function of one's own. So the places are taken not only for the forward pass but around
every backward pass through its graph too, as often as there are any. Between passes, and after a
failure, the model is as it was, to the last bit and attribute.

Example:
    >>> import torch
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> at_zero = Swapped(model, Replaced([model.weight], [torch.zeros(1, 2)]), nullcontext)
    >>> with at_zero:
    ...     output = model(torch.ones(2)).item()
    >>> output, bool((model.weight == 0).any())
    (0.0, False)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from thalweg.loss.attributes import Attributes
from thalweg.loss.guards.dtypes import is_low, raised, run_dtype
from thalweg.loss.guards.wrapped import unwrapped
from thalweg.loss.shards import without_hooks


class Places(Protocol):
    """How the tensors of a point get into a model, and out of it."""

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """What the loss is differentiated by, shaped like the parameters."""
        ...

    def take(self, modules: Sequence[nn.Module]) -> None:
        """Put the tensors in; the caller puts back what modules have registered."""
        ...

    def leave(self) -> None:
        """Put back what the caller does not."""
        ...


class Replaced:
    """Other tensors in the places of the parameters, which stay untouched themselves.

    Args:
        parameters: the model's own, in theta's order.
        pieces: a point's tensors, shaped like them; used without a copy, and never written to
            where the forward pass doesn't.
        others: further parameters, no part of theta, and what stands in their places.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        pieces: Sequence[Tensor],
        others: Sequence[tuple[Tensor, Tensor]] = (),
    ) -> None:
        with torch.inference_mode(False):
            self.leaves = tuple(piece.detach().requires_grad_() for piece in pieces)
        self._at = {
            **_in_their_dtypes(parameters, self.leaves),
            **_in_their_dtypes([one for one, _ in others], [value for _, value in others]),
        }

    @classmethod
    def by_any(cls, parameters: Sequence[Tensor], tensors: Sequence[Tensor]) -> Self:
        """With tensors as they are, which may be those of a transform of `torch.func`."""
        places = cls.__new__(cls)
        places.leaves = tuple(tensors)
        places._at = _in_their_dtypes(parameters, tensors)
        return places

    def take(self, modules: Sequence[nn.Module]) -> None:
        """See `Places`."""
        for module in modules:
            registered = module._parameters
            for name, parameter in registered.items():
                if id(parameter) in self._at:
                    registered[name] = self._at[id(parameter)]  # type: ignore[assignment]

    def leave(self) -> None:
        """See `Places`."""


class Overwritten:
    """The parameters themselves, which hold the values of a point while it lasts.

    For a model that has a parameter of its own at hand, in a closure or a list, beside the
    module's attribute. Views of it that were made before follow, copies do not.

    Args:
        parameters: the model's own, in theta's order.
        pieces: a point's tensors, shaped like them.
    """

    def __init__(self, parameters: Sequence[Tensor], pieces: Sequence[Tensor]) -> None:
        self.leaves = tuple(parameters)
        self._pieces = pieces
        self._held: list[tuple[Tensor, Tensor, Any, bool]] = []

    @torch.no_grad()
    def take(self, modules: Sequence[nn.Module]) -> None:
        """See `Places`."""
        for parameter, piece in zip(self.leaves, self._pieces, strict=True):
            hooks, required = parameter._backward_hooks, parameter.requires_grad
            self._held.append((parameter, parameter.detach().clone(), hooks, required))
            # By `data` the graphs that the user has do not see a change.
            parameter.data.copy_(piece)
            # A hook that changes the gradient is no part of the loss.
            parameter._backward_hooks = None
            parameter.requires_grad_(True)

    @torch.no_grad()
    def leave(self) -> None:
        """See `Places`."""
        while self._held:
            parameter, value, hooks, required = self._held.pop()
            parameter.data.copy_(value)
            parameter._backward_hooks = hooks
            parameter.requires_grad_(required)


class Swapped:
    """A model at a point, entered around every pass; see the module.

    Args:
        model: any module.
        places: the tensors of the point.
        settings: what a pass needs besides, made at each entry.
        low: evaluate what is in a dtype of low precision in float32: see `guards/dtypes.py`.

    Attributes:
        versions: of each leaf before the first pass; torch counts them where it is written to.
    """

    def __init__(
        self,
        model: nn.Module,
        places: Places,
        settings: Callable[[], AbstractContextManager[object]],
        *,
        low: bool = False,
    ) -> None:
        self._modules = list(model.modules())
        self._places = places
        self._settings = settings
        self._low = low
        self._entered: AbstractContextManager[object] = nullcontext()
        self._before = Attributes([])
        self._after: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._buffers: list[tuple[Tensor, Tensor]] = []
        self._depth = 0
        self.versions = [leaf._version for leaf in places.leaves]

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """What the loss is differentiated by, shaped like the parameters."""
        return self._places.leaves

    def __enter__(self) -> Self:
        self._depth += 1
        if self._depth > 1:
            return self
        self._entered = self._settings()
        self._entered.__enter__()
        self._before = Attributes(self._modules)
        try:
            self._places.take(self._modules)
            self._copy_the_rest()
            for attributes, changed in self._after:
                attributes.update(changed)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._depth -= 1
        if self._depth:
            return
        try:
            # A backward pass is to find what the forward pass has left.
            self._after = self._before.changed()
            self._before.put_back()
            self._places.leave()
            while self._buffers:
                buffer, value = self._buffers.pop()
                buffer.data.copy_(value)
        finally:
            self._entered.__exit__(None, None, None)

    def _copy_the_rest(self) -> None:
        """Modules out of their wrappers, copies of buffers, frozen parameters in their dtype."""
        copies: dict[int, Tensor] = {}
        for module in self._modules:
            without_hooks(module)
            for name, child in module._modules.items():
                if child is not None and (inside := unwrapped(child)) is not child:
                    module._modules[name] = inside
            for name, buffer in module._buffers.items():
                if buffer is None:
                    continue
                if isinstance(module, torch.jit.ScriptModule):
                    # Cannot be swapped.
                    self._buffers.append((buffer, buffer.clone()))
                else:
                    if id(buffer) not in copies:
                        copy = buffer.clone()
                        copies[id(buffer)] = raised(copy) if self._low else copy
                    module._buffers[name] = copies[id(buffer)]
            if self._low:
                for name, parameter in module._parameters.items():
                    if parameter is not None:
                        module._parameters[name] = raised(parameter)  # type: ignore[assignment]


def _in_their_dtypes(
    parameters: Sequence[Tensor], tensors: Sequence[Tensor]
) -> Mapping[int, Tensor]:
    """By a parameter's identity: what stands in its place, in the dtype that it is evaluated in.

    Where all parameters are of one dtype the tensors are taken as they are.
    """
    if len({p.dtype for p in parameters}) > 1 or is_low(parameters):
        with torch.enable_grad():
            pairs = zip(parameters, tensors, strict=True)
            tensors = [tensor.to(run_dtype(parameter.dtype)) for parameter, tensor in pairs]
    for tensor in tensors:
        # By this torch tells a parameter: `get_parameter`, `isinstance(..., nn.Parameter)`.
        tensor._is_param = True  # type: ignore[attr-defined]
    return dict(zip(map(id, parameters), tensors, strict=True))
