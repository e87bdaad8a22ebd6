"""Copies of models and their losses in another dtype, for checks that must not touch the user's.

A copy in float64 tells a fault from rounding. Where a model cannot be copied, or is too large for
it, checks are made on the model itself, which says less.

Example:
    >>> import torch
    >>> in_dtype(torch.nn.Linear(3, 2), torch.float64).weight.dtype
    torch.float64
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from thalweg.errors import InvalidInput
from thalweg.loss.samples import Batch, Samples

FEW = 4
MOST_COPIED = 2**25
"""Numbers in the largest model that is copied: 256 MiB in float64."""


def few_of(count: int, few: int = FEW) -> Tensor:
    """The indices of a few of so many samples, spread evenly, int64."""
    return torch.linspace(0, count - 1, min(few, count), device="cpu").round().long()


def in_dtype(value: Any, dtype: torch.dtype, copied: Callable[[], dict[int, Any]] = dict) -> Any:
    """A copy of a tensor, module or partial function, its floating-point numbers in a dtype.

    Whatever else is given back as it is.

    Args:
        value: of which to make one.
        dtype: of the copy.
        copied: copies of parts of a module that there are already, by identity.

    Raises:
        InvalidInput: a module of more than `MOST_COPIED` numbers.
        Exception: whatever a module raises that cannot be copied.
    """
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, nn.Module):
        tensors = [*value.parameters(), *value.buffers()]
        if sum(tensor.numel() for tensor in tensors) > MOST_COPIED:
            raise InvalidInput("the model is too large to be copied")
        return copy.deepcopy(value, _computed(value) | copied()).to(dtype)
    if isinstance(value, functools.partial):
        keywords = {name: in_dtype(part, dtype) for name, part in value.keywords.items()}
        return functools.partial(value.func, *value.args, **keywords)
    return value


def _computed(model: nn.Module) -> dict[int, Any]:
    """Copies of tensors that modules hold with a graph, which `deepcopy` refuses, by identity."""
    held = (value for module in model.modules() for value in vars(module).values())
    return {
        id(value): value.detach().clone()
        for value in held
        if isinstance(value, Tensor) and not value.is_leaf
    }


class SamplesInDtype:
    """The same samples, their floating-point numbers in another dtype."""

    def __init__(self, samples: Samples, dtype: torch.dtype) -> None:
        self.samples, self.dtype = samples, dtype

    def __len__(self) -> int:
        return len(self.samples)

    def chunks(self, indices: Tensor | None, size: int | None) -> Iterator[tuple[Batch, int]]:
        """See `Samples`."""
        for batch, count in self.samples.chunks(indices, size):
            yield tree_map(lambda leaf: in_dtype(leaf, self.dtype), batch), count
