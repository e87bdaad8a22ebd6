"""What a loss averages over: samples, unless it is known to weigh targets unequally.

The mean over a data set in chunks is right only if every chunk enters with the weight by which
its own mean was divided. `nn.CrossEntropyLoss(weight=w)` divides by the sum of w over the targets,
one with `ignore_index` by the number of targets that are left.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from thalweg.errors import invalid
from thalweg.loss.samples import Batch

TARGET_NAMES = ("labels", "label", "target", "targets")


def batch_weight_of(loss: object) -> Callable[[Batch], Tensor] | None:
    """The weight of a batch for the losses of torch; None where it is the number of samples.

    Known are the modules of `torch.nn`, the functions of `torch.nn.functional`, and
    `functools.partial` of these.

    Raises:
        InvalidInput: a loss with reduction "sum" or "none", which is not a mean.
    """
    function, options = _settings(loss)
    reduction = options.get("reduction", "mean")
    if reduction not in ("mean", "batchmean"):
        name = getattr(function, "__name__", type(function).__name__)
        raise invalid("loss", f"{name}(reduction={reduction!r})", "reduction='mean'")
    if not (
        isinstance(function, (nn.CrossEntropyLoss, nn.NLLLoss))
        or function in (functional.cross_entropy, functional.nll_loss)
    ):
        return None
    class_weights: Tensor | None = options.get("weight")
    ignored: int = options.get("ignore_index", -100)

    def weight(batch: Batch) -> Tensor:
        target = target_of(batch)
        if target.is_floating_point():
            # Class probabilities (n, classes, ...): torch divides by the number of distributions.
            classes = target.shape[1] if target.dim() > 1 else 1
            return torch.tensor(float(target.numel() // classes), device="cpu")
        # Without picking targets out, so that `vmap` weighs many batches at once.
        kept = target != ignored
        if class_weights is None:
            return kept.sum()
        weights = class_weights.to(target.device)[torch.where(kept, target, 0)]
        return torch.where(kept, weights, 0).sum()

    return weight


def is_torch_loss(loss: object) -> bool:
    """Whether it takes (output, target): a loss of `torch.nn`, or one of its functions."""
    function, _ = _settings(loss)
    module = getattr(function, "__module__", "")
    return isinstance(function, nn.modules.loss._Loss) or module == functional.__name__


def target_of(batch: Batch) -> Tensor:
    """What a loss of torch compares the output with: the last part, or the entry of that name."""
    if isinstance(batch, Mapping):
        return batch[target_name(batch)]
    return batch[-1]


def target_name(batch: Mapping[str, Any]) -> str:
    """The key of the target in a dict batch."""
    name = next((name for name in TARGET_NAMES if name in batch), None)
    if name is None:
        raise invalid("batch", list(batch), "a 'labels' or 'target' entry", "or pass batch_weight")
    return name


def _settings(loss: object) -> tuple[object, dict[str, Any]]:
    """The module or function, and its options that decide what it averages over."""
    if isinstance(loss, functools.partial):
        function, options = _settings(loss.func)
        return function, options | loss.keywords
    if isinstance(loss, nn.Module):
        names = ("reduction", "weight", "ignore_index")
        return loss, {name: getattr(loss, name) for name in names if hasattr(loss, name)}
    return loss, {}
