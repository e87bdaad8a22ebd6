"""The model inside of what people wrap around one: what is differentiated.

A compiled module has no second derivative, and a module for parallel training talks to other
processes at each pass. Both hold the model that they were made from, with the same parameters.
Accelerate leaves the module as it is, and puts a forward pass in mixed precision in its place.

Example:
    >>> import torch
    >>> model = torch.nn.Linear(2, 1)
    >>> unwrapped(torch.nn.DataParallel(model)) is model
    True
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

PREFIXES = ("_orig_mod.", "module.")


def unwrapped(module: nn.Module) -> nn.Module:
    """The module itself, out of `torch.compile`, `DataParallel` or `DistributedDataParallel`."""
    while True:
        if isinstance(module, (DataParallel, DistributedDataParallel)):
            module = module.module
        elif _is_compiled(module):
            module = module._orig_mod  # type: ignore[assignment]
        else:
            return module


@contextmanager
def own_forward(model: nn.Module) -> Iterator[None]:
    """Call the forward pass that a model has of its own, without Accelerate's mixed precision.

    `Accelerator.prepare`, and so the `Trainer` of transformers, sets `forward` of the model itself
    to one that enters autocast: that is the trainer's precision, not the model's.
    """
    prepared = [module for module in model.modules() if _is_prepared(module)]
    forwards = [module.forward for module in prepared]
    for module in prepared:
        module.forward = module._original_forward  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, forward in zip(prepared, forwards, strict=True):
            module.forward = forward


def patterns_inside(patterns: Sequence[str] | str | None) -> Sequence[str] | str | None:
    """Patterns of names as they are inside of a wrapper, of such that may begin with its own."""
    if patterns is None or isinstance(patterns, str):
        return None if patterns is None else _inside(patterns)
    return [_inside(pattern) for pattern in patterns]


def _inside(pattern: str) -> str:
    for prefix in PREFIXES * 2:
        pattern = pattern.removeprefix(prefix)
    return pattern


def _is_compiled(module: nn.Module) -> bool:
    # To import torch's compiler takes seconds; before that nothing is compiled.
    compiler: Any = sys.modules.get("torch._dynamo.eval_frame")
    return compiler is not None and isinstance(module, compiler.OptimizedModule)


def _is_prepared(module: nn.Module) -> bool:
    held = vars(module)
    if not {"forward", "_original_forward"} <= held.keys():
        return False
    # By its name: Accelerate need not be installed.
    around = getattr(held["forward"], "__wrapped__", None)
    return type(around).__name__ == "ConvertOutputsToFp32"
