"""A point in the plane, whose output for a sample is that sample's loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class PointInTheValley(nn.Module):
    """theta = (x, y), a parameter (2,): the output is (a x^2 + b y^2) / 2 + c x y."""

    def __init__(self, start: Sequence[float]) -> None:
        super().__init__()
        # In float64: a start such as 0.05 is not a float32, and "the same start" would depend on
        # the dtype. `build_problem` converts it to that of the spec.
        self.theta = nn.Parameter(torch.tensor(start, dtype=torch.float64))

    def forward(self, coefficients: Tensor) -> Tensor:
        """Losses (n,) of components with coefficients (a, b, c), (n, 3)."""
        x, y = self.theta
        return coefficients @ torch.stack([x.square() / 2, y.square() / 2, x * y])
