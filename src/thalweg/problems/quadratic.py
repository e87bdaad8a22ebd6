"""A quadratic in many dimensions, a few of them steep, on which SGD can be predicted exactly.

    L(theta) = theta^T A theta / 2,   component i: theta^T A theta / 2 - theta^T A xi_i

These are the squares (theta - xi_i)^T A (theta - xi_i) / 2 less a constant, so that the least loss
is 0. The offsets xi_i have mean 0: the gradient of a mini-batch is A theta - A xi_B, xi_B the mean
of its offsets, and its noise does not depend on theta. A is diagonal, its largest entries first.
What follows for SGD is in `quadratic_theory.py`.

Example:
    >>> samples = Quadratic(components=50, dimension=6, dominant=2, steep=4.0, flat=0.1).build()
    >>> samples.train_inputs.shape, samples.train_inputs[0, 0].tolist()
    ((50, 2, 6), [4.0, 4.0, 0.1, 0.1, 0.1, 0.1])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import Field, model_validator

from thalweg.errors import InvalidInput
from thalweg.problems.data.dataset import InputShape, Samples
from thalweg.registry import datasets, models
from thalweg.settings import Settings, bad_value

if TYPE_CHECKING:
    from typing import Self

    from torch import nn

Count = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0)]


@datasets.register("quadratic")
class Quadratic(Settings):
    """Components of a quadratic: a sample is its curvatures (d,) and slopes A xi (d,).

    Needs the model `quadratic` and the loss `output`.

    The offsets are normal, then shifted to mean 0. Batches go through all samples before one comes
    again, so that noise cancels within an epoch: take more components than a run takes samples for
    noise that is independent from step to step.
    """

    components: Annotated[int, Field(ge=2)] = Field(default=2000, description="how many, n")
    dimension: Count = Field(default=100, description="parameters, d")
    dominant: Count = Field(default=10, description="steep directions, k")
    steep: float = Field(default=1.0, description="curvature of the steep directions")
    flat: float = Field(default=0.02, description="curvature of the other directions")
    curvatures: tuple[float, ...] = Field(
        default=(), description="curvature of each direction, in place of steep and flat"
    )
    offset_dominant: NotNegative = Field(
        default=1.0, description="standard deviation of the offsets along each steep direction"
    )
    offset_bulk: NotNegative = Field(
        default=1.0, description="standard deviation of the offsets along each other direction"
    )
    seed: Annotated[int, Field(ge=0)] = Field(default=0, description="seed of the offsets")

    @model_validator(mode="after")
    def _sizes_agree(self) -> Self:
        if self.dominant >= self.dimension:
            raise bad_value("dominant", self.dominant, f"less than dimension, {self.dimension}")
        if self.curvatures and len(self.curvatures) != self.dimension:
            allowed = f"one for each of {self.dimension} dimensions"
            raise bad_value("curvatures", self.curvatures, allowed, "or leave it out")
        return self

    def spectrum(self) -> np.ndarray:
        """The diagonal of A, float64 (d,)."""
        if self.curvatures:
            return np.array(self.curvatures, dtype=np.float64)
        return np.repeat([self.steep, self.flat], [self.dominant, self.dimension - self.dominant])

    def build(self) -> Samples:
        scales = np.repeat(
            [self.offset_dominant, self.offset_bulk],
            [self.dominant, self.dimension - self.dominant],
        )
        drawn = np.random.default_rng(self.seed).standard_normal((self.components, self.dimension))
        offsets = (drawn - drawn.mean(axis=0)) * scales
        spectrum = self.spectrum()
        slopes = offsets * spectrum
        inputs = np.stack([np.broadcast_to(spectrum, slopes.shape), slopes], axis=1)
        return Samples(inputs, np.zeros(self.components), num_classes=None)


@models.register("quadratic")
class PointOnQuadratic(Settings):
    """One parameter vector theta (d,); the output for a sample is that component's loss."""

    radius: NotNegative = Field(
        default=1.0, description="norm of theta at the start, in a random direction"
    )

    def build(self, inputs: InputShape, outputs: int) -> nn.Module:
        if len(inputs.shape) != 2 or inputs.shape[0] != 2:
            raise InvalidInput(
                f"model quadratic: inputs of shape {inputs.shape}, allowed: curvatures and slopes "
                "(2, d), as of data set quadratic"
            )
        return _network(inputs.shape[1], self.radius)


def _network(dimension: int, radius: float) -> nn.Module:
    """theta in a random direction at distance `radius` from the origin, and its losses."""
    import torch
    from torch import Tensor, nn

    class QuadraticLosses(nn.Module):
        """theta, a parameter (d,): the output is sum_j (h_j theta_j^2 / 2 - s_j theta_j)."""

        def __init__(self) -> None:
            super().__init__()
            direction = torch.randn(dimension)
            self.theta = nn.Parameter(radius * direction / direction.norm())

        def forward(self, components: Tensor) -> Tensor:
            """Losses (n,) of components (n, 2, d): curvatures h, then slopes s."""
            curvatures, slopes = components.unbind(dim=1)
            return curvatures @ (self.theta.square() / 2) - slopes @ self.theta

    return QuadraticLosses()
