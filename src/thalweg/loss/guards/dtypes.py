"""In which dtype is a loss computed, whose parameters may be in several?

theta, gradients, products and bases are in the widest dtype of the parameters, and never below
float32: the rounding of bfloat16 (3 digits) is larger than the errors that subspaces are solved to,
and torch has no QR in it. A model that has parameters in bfloat16 or float16 is evaluated as a
whole in float32: the same function, rounded less. Parameters in complex numbers or in 8 bits are
refused by name.

Example:
    >>> widest([torch.bfloat16, torch.float16])
    torch.float32
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from thalweg.errors import invalid

LOW = (torch.bfloat16, torch.float16)
"""Dtypes that a model may be held in, and is not evaluated in."""


def refuse_unfit_dtypes(parameters: Mapping[str, Tensor]) -> None:
    """Raise for the first parameter that cannot be a part of theta.

    Args:
        parameters: by name.

    Raises:
        InvalidInput: a parameter is complex, in a dtype of 8 bits, or has no shape yet.
    """
    allowed = "float32, float64, bfloat16 or float16"
    for name, parameter in parameters.items():
        what, dtype = f"parameter {name!r}", str(parameter.dtype)
        if isinstance(parameter, UninitializedParameter):
            raise invalid(what, "no shape yet", "a tensor", "evaluate the model once before")
        if parameter.is_complex():
            hint = "hold torch.view_as_real of it, and take torch.view_as_complex in forward"
            raise invalid(what, dtype, allowed, hint)
        if parameter.dtype not in (torch.float32, torch.float64, *LOW):
            hint = "give a copy of the model in float32: copy.deepcopy(model).float()"
            raise invalid(what, dtype, allowed, hint)


def widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The dtype that holds the numbers of all, at least float32."""
    return reduce(torch.promote_types, dtypes, torch.float32)


def is_low(parameters: Iterable[Tensor]) -> bool:
    """Whether a model with these parameters is evaluated in float32 in place of its own dtype."""
    return any(parameter.dtype in LOW for parameter in parameters)


def run_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a tensor of this dtype is evaluated in."""
    return torch.float32 if dtype in LOW else dtype


def raised(tensor: Tensor) -> Tensor:
    """A tensor of low precision in float32, others as they are."""
    return tensor.to(run_dtype(tensor.dtype))


class InFloat32(TorchFunctionMode):
    """Evaluate in float32 what a model asks to be computed in bfloat16 or float16.

    Casts and new tensors of these dtypes are in float32, and so is whatever else of them a
    function is given, such as a constant that is no buffer. `torch.autocast` inside of a model
    does as it is told. Costs a few us for each operation.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """See `TorchFunctionMode`."""
        if func in (Tensor.bfloat16, Tensor.half):
            func = Tensor.float
        named = {name: _raised(value) for name, value in (kwargs or {}).items()}
        return func(*map(_raised, args), **named)


def _raised(argument: Any) -> Any:
    if isinstance(argument, torch.dtype):
        return run_dtype(argument)
    if isinstance(argument, (list, tuple)):
        return tree_map_only(Tensor, _raised, argument)
    return raised(argument) if isinstance(argument, Tensor) else argument
