"""What a loss averages over: samples, unless it is known to weigh targets unequally.

The mean over a data set in chunks is right only if every chunk enters with the weight by which
its own mean was divided. `nn.CrossEntropyLoss(weight=w)` divides by the sum of w over the targets,
one with `ignore_index` by the number of targets that are left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from thalweg.curvature.samples import Batch
from thalweg.errors import invalid


def batch_weight_of(loss: object) -> Callable[[Batch], Tensor] | None:
    """The weight of a batch for the losses of `torch.nn`; None where it is the number of samples.

    Raises:
        InvalidInput: a loss with reduction "sum" or "none", which is not a mean.
    """
    reduction = getattr(loss, "reduction", "mean")
    if isinstance(loss, nn.Module) and reduction not in ("mean", "batchmean"):
        raise invalid("loss", f"{type(loss).__name__}(reduction={reduction!r})", "reduction='mean'")
    if not isinstance(loss, (nn.CrossEntropyLoss, nn.NLLLoss)):
        return None

    def weight(batch: Batch) -> Tensor:
        target = _target(batch)
        if target.is_floating_point():
            return torch.tensor(float(len(target)))
        kept = target[target != loss.ignore_index]
        if loss.weight is None:
            return torch.tensor(float(kept.numel()))
        return loss.weight.to(kept.device)[kept].sum()

    return weight


def _target(batch: Batch) -> Tensor:
    if isinstance(batch, Mapping):
        name = next((n for n in ("labels", "label", "target", "targets") if n in batch), None)
        if name is None:
            raise invalid(
                "batch", list(batch), "a 'labels' or 'target' entry", "or pass batch_weight"
            )
        return batch[name]
    return batch[-1]
