"""A loss that is no number is told as that, and blamed for nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from thalweg.errors import Diverged
from thalweg.loss.objective import Objective
from thalweg.operators.hessian import Hessian
from thalweg.tracking.tracker import SubspaceTracker


def own_loss(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


def product(objective: Objective) -> Any:
    return Hessian(objective) @ torch.ones(objective.num_parameters)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("loss", [own_loss, nn.MSELoss()], ids=["own", "torch"])
@pytest.mark.parametrize(
    "asked", [Objective.gradient, product, lambda o: SubspaceTracker(o, 1).update()]
)
def test_parameters_that_are_no_numbers_are_divergence(
    value: float, loss: Any, asked: Callable[[Objective], Any]
) -> None:
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.bias.fill_(value)
    objective = Objective(model, loss, (torch.randn(12, 2), torch.randn(12, 1)), chunk_size=4)
    with pytest.raises(Diverged, match="NaN or infinite"):
        asked(objective)
