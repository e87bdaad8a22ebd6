"""Gradients that torch would make sparse are made dense: most operations take no sparse tensor.

Example:
    >>> import torch
    >>> table = torch.nn.Parameter(torch.ones(3, 2))
    >>> with Dense():
    ...     rows = torch.nn.functional.embedding(torch.tensor([1]), table, sparse=True)
    >>> torch.autograd.grad(rows.sum(), table)[0].layout
    torch.strided
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

NAMES = ("sparse", "sparse_grad")
FUNCTIONS = (functional.embedding, functional.embedding_bag, torch.gather, torch.Tensor.gather)


def layers_with_sparse_gradients(model: nn.Module) -> list[Any]:
    """Layers of torch whose gradients may be sparse, by their attribute `sparse`."""
    return [m for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]


class Dense(TorchFunctionMode):
    """Functions that are asked for sparse gradients by keyword make dense ones.

    For functions that a model calls itself; layers are told by their attribute.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """See `TorchFunctionMode`."""
        named = dict(kwargs or {})
        if func in FUNCTIONS:
            named.update({name: False for name in NAMES if name in named})
        return func(*args, **named)
