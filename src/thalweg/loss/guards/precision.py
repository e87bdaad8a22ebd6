"""Second derivatives on a GPU in the precision of their tensors.

On NVIDIA GPUs torch multiplies float32 convolutions in TF32, with 10 bits of mantissa, unless it is
told otherwise, and matrices after `torch.set_float32_matmul_precision("high")`. Products with a
Hessian would be off by a thousandth, and bases no longer orthonormal. So while Thalweg
differentiates, both are off; the user's own training keeps what it has.

cuDNN's recurrent layers have no second derivative: `twice_differentiable` takes torch's own there.

Example:
    >>> with full_precision():
    ...     torch.backends.cudnn.conv.fp32_precision in ("ieee", "tf32")  # "ieee" on a GPU
    True
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

FULL, LOWERED = "ieee", "tf32"


@contextmanager
def full_precision() -> Iterator[None]:
    """Convolutions and matrix products of float32 in float32, where a GPU is in use.

    Two may be nested. Source: "CUDA semantics" in the documentation of torch, on TF32.
    """
    backends: Any = torch.backends  # the type stubs lack the settings by operation
    places = (backends.cudnn.conv, backends.cuda.matmul) if torch.cuda.is_initialized() else ()
    lowered = [place for place in places if place.fp32_precision == LOWERED]
    for place in lowered:
        place.fp32_precision = FULL
    try:
        yield
    finally:
        for place in lowered:
            place.fp32_precision = LOWERED


def has_recurrent_layers(model: nn.Module) -> bool:
    """Whether a model has layers for which cuDNN has a first derivative only."""
    return any(isinstance(module, nn.RNNBase) for module in model.modules())


@contextmanager
def twice_differentiable(recurrent: bool) -> Iterator[None]:
    """Evaluate a model with recurrent layers without cuDNN; others as they are.

    Args:
        recurrent: whether the model has such layers.
    """
    enabled = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = enabled and not recurrent  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = enabled  # type: ignore[assignment]
