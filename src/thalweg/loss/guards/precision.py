"""Recurrent layers on a GPU: cuDNN's have no second derivative, torch's own do.

Example:
    >>> import torch
    >>> has_recurrent_layers(torch.nn.GRU(2, 3)), has_recurrent_layers(torch.nn.Linear(2, 3))
    (True, False)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


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
