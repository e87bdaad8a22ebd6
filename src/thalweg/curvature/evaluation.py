"""A model and its loss on one batch, with the graph from the parameters to outputs and loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from thalweg.curvature.samples import Batch
from thalweg.curvature.weighting import is_torch_loss, target_name
from thalweg.errors import invalid


class Evaluation(NamedTuple):
    """One chunk of samples, evaluated.

    Attributes:
        share: the weight of the chunk in the mean over all that was asked for.
        samples: how many samples the chunk has.
        leaves: the parameters, leaves of the graph.
        outputs: what the loss is a function of: the model's outputs. Empty where the model returns
            nothing but its loss.
        loss: the mean loss of the chunk, a scalar.
    """

    share: float
    samples: int
    leaves: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    loss: Tensor


class LossOfBatch(nn.Module):
    """Outputs and loss as a function of one batch, so that parameters can be swapped under it."""

    def __init__(self, model: nn.Module, loss: Callable[[Any, Any], Tensor] | None) -> None:
        super().__init__()
        self.model = model
        # Kept out of the module tree: a loss with buffers of its own is a constant.
        self._loss = [loss]

    def forward(self, batch: Batch) -> tuple[tuple[Tensor, ...], Tensor]:
        """Outputs that depend on the parameters, and the loss."""
        output, loss = self._output_and_loss(batch)
        return _differentiable_outputs(output, loss), loss

    def _output_and_loss(self, batch: Batch) -> tuple[Any, Tensor]:
        loss = self._loss[0]
        if not isinstance(batch, Mapping):
            *inputs, target = batch if loss is not None else (*batch, None)
            output = self.model(*inputs)
            return output, _own_loss(output) if loss is None else loss(output, target)
        if loss is not None and is_torch_loss(loss):
            target = target_name(batch)
            inputs = {name: value for name, value in batch.items() if name != target}
            output = self.model(**inputs)
            return output, loss(output, batch[target])
        output = self.model(**batch)
        return output, _own_loss(output) if loss is None else loss(output, batch)


def _differentiable_outputs(output: Any, loss: Tensor) -> tuple[Tensor, ...]:
    """The tensors among a model's outputs that depend on its parameters, but for the loss itself.

    Of a model that returns its own loss: `.logits` where there is one, since the other outputs
    (hidden states) are no last stage before the loss.
    """
    if isinstance(output, Mapping):
        output = output.get("logits", output)
    else:
        output = getattr(output, "logits", output)
    if not isinstance(output, (Tensor, tuple, list, Mapping)):
        return ()
    return tuple(
        leaf
        for leaf in tree_leaves(output)
        if isinstance(leaf, Tensor) and leaf.requires_grad and leaf is not loss
    )


def _own_loss(output: Any) -> Tensor:
    """The loss that a model returns: a scalar, or an entry or attribute `loss`."""
    found = output["loss"] if isinstance(output, Mapping) else getattr(output, "loss", output)
    if not isinstance(found, Tensor):
        raise invalid("model output", type(output).__name__, "a scalar or an object with .loss")
    return found
