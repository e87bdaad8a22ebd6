"""Counts the samples that a training evaluates, by a hook on the model's forward pass.

The training is bit for bit what it is without. Evaluations under `torch.no_grad` and those of
Thalweg itself do not count. A compiled model is not heard: what is compiled runs no hooks; nor is a
training that calls parts of the model alone. What is told counts then.

Example:
    >>> model = torch.nn.Linear(3, 2)
    >>> counted = TrainingSamples([model])
    >>> _ = model(torch.randn(5, 3))
    >>> with torch.no_grad():
    ...     _ = model(torch.randn(7, 3))
    >>> counted.samples
    5
    >>> counted.close()
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from thalweg.loss.evaluation import is_evaluating


class TrainingSamples:
    """How many samples some models were given, in forward passes that build a graph.

    Args:
        models: those that are trained. TorchScript modules take no hooks, and are not heard.
        whole: each pass counts as one sample, whatever its batch.

    Attributes:
        heard: samples since they were taken last: the sum of the first dimension of each pass's
            first tensor.
        told: those that the training has told since.
    """

    def __init__(self, models: Iterable[nn.Module], *, whole: bool = False) -> None:
        self.heard, self.told, self.whole = 0, 0, whole
        # A pass within another, as where a trainer calls a step by the model's own forward.
        self.depth = 0
        self._hooks: list[RemovableHandle] = []
        for model in models:
            with contextlib.suppress(RuntimeError):
                before, after = _Hook(self, begins=True), _Hook(self, begins=False)
                self._hooks.append(model.register_forward_pre_hook(before, with_kwargs=True))
                self._hooks.append(
                    model.register_forward_hook(after, with_kwargs=True, always_call=True)
                )

    @property
    def samples(self) -> int:
        """How many since they were taken last: those heard; where there are none, those told."""
        return self.heard or self.told

    def tell(self, samples: int) -> None:
        """Count a pass over so many samples, in case that it is not heard."""
        self.told += 1 if self.whole else samples

    def take(self) -> int:
        """What was counted; from here on it begins at 0."""
        taken, self.heard, self.told = self.samples, 0, 0
        return taken

    def close(self) -> None:
        """Take the hooks away."""
        while self._hooks:
            self._hooks.pop().remove()


class _Hook:
    """Hears the passes of a model, but not those of its copies, nor those of one that was saved."""

    def __init__(self, counted: TrainingSamples | None = None, *, begins: bool = True) -> None:
        self._counted, self._begins = counted, begins

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], keywords: Any, output: Any = None
    ) -> None:
        # Compilers read this as nothing: what they compile counts no passes.
        if torch.compiler.is_compiling() or self._counted is None:
            return
        if not self._begins:
            self._counted.depth -= 1
            return
        self._counted.depth += 1
        outermost = self._counted.depth == 1
        if outermost and torch.is_grad_enabled() and not is_evaluating():
            whole = self._counted.whole
            self._counted.heard += 1 if whole else samples_in((args, dict(keywords)))

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return _Hook()

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


def samples_in(batch: object) -> int:
    """How many samples a batch has: the length of the first tensor that has one, 0 without."""
    with contextlib.suppress(Exception):
        for leaf in tree_leaves(batch):
            if isinstance(leaf, Tensor) and leaf.dim() > 0:
                return int(leaf.shape[0])
    return 0
