"""A loss as trainers have it: a function of the model and a batch, which calls the model itself.

Example:
    >>> import torch
    >>> from thalweg.loss.objective import Objective
    >>> def compute_loss(model, batch):
    ...     inputs, targets = batch
    ...     return (model(inputs) - targets).square().mean()
    >>> model, data = torch.nn.Linear(3, 2), (torch.randn(8, 3), torch.randn(8, 2))
    >>> ours = Objective(model, ComputeLoss(compute_loss), data).value()
    >>> torch.allclose(ours, Objective(model, torch.nn.MSELoss(), data).value())
    True
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from thalweg.errors import invalid


@dataclass(frozen=True)
class ComputeLoss:
    """In the place of a loss: `compute(model, batch)`, for `Objective` and `watch`.

    `transformers.Trainer.compute_loss` is one as it stands; of a Lightning module it is
    `lambda module, batch: module.training_step(batch, 0)`; of an equation a function that calls the
    model and takes derivatives of what it gives.

    Attributes:
        compute: gets the model, its parameters at the point in question, and a batch as it is in
            the data, a copy. It gives the mean loss over the batch: a scalar, a dict or object with
            `loss`, or a tuple that begins with it.

    Raises:
        InvalidInput: it is nothing that can be called.

    Example: see the module.
    """

    compute: Callable[[nn.Module, Any], Any]

    def __post_init__(self) -> None:
        if not callable(self.compute):
            raise invalid("compute", type(self.compute).__name__, "a function of (model, batch)")

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        """What `compute` gives."""
        return self.compute(model, batch)
