"""A point in many dimensions, whose output for a sample is that sample's quadratic loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PointOnAQuadratic(nn.Module):
    """theta, a parameter (d,): the output is sum_j (h_j theta_j^2 / 2 - s_j theta_j).

    It starts in a random direction at distance `radius` from the origin.
    """

    def __init__(self, dimension: int, radius: float) -> None:
        super().__init__()
        direction = torch.randn(dimension)
        self.theta = nn.Parameter(radius * direction / direction.norm())

    def forward(self, components: Tensor) -> Tensor:
        """Losses (n,) of components (n, 2, d): curvatures h, then slopes s."""
        curvatures, slopes = components.unbind(dim=1)
        return curvatures @ (self.theta.square() / 2) - slopes @ self.theta
