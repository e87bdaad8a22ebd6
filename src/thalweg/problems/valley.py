"""The toy: a valley with a steep and a flat direction, whose mini-batches disagree about the walls.

    L(x, y) = (a x^2 + b y^2) / 2 = mean of L(x, y) + c x y and L(x, y) - c x y

A mini-batch of one sample sees the gradient (a x, b y) +- c (y, x): where y is large and x small,
the noise points at the walls. GD sinks to the floor x = 0 and its gradient points along it; SGD
bounces between the walls, and its gradient points at them, though only y makes progress:
E (x, y) = ((1 - lr a)^t x_0, (1 - lr b)^t y_0) for both.

Source: Song, Ahn, Yun 2025 (arXiv 2405.16002), the toy valley and its coupling term. The values
of a, b and c are ours.

Example:
    >>> Valley().build().train_inputs.tolist()
    [[1000.0, 1.0, 100.0], [1000.0, 1.0, -100.0]]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import Field

from thalweg.errors import InvalidInput
from thalweg.problems.data.dataset import InputShape, Samples
from thalweg.registry import datasets, models
from thalweg.settings import Settings

if TYPE_CHECKING:
    from torch import nn


@datasets.register("valley")
class Valley(Settings):
    """The components of a valley: samples (a, b, c) and (a, b, -c), nothing to predict.

    Needs the model `valley` and the loss `output`.

    Batches go through all samples before one comes again. With one copy of each component and
    batches of one, -c therefore follows +c at once, and this order alone lowers y by the factor
    1 - (lr c)^2 every two steps. Many copies make the signs of successive batches independent.
    """

    steep: float = Field(default=1000.0, description="a, curvature across the valley")
    flat: float = Field(default=1.0, description="b, curvature along the valley")
    coupling: float = Field(default=100.0, description="c, of the term +- c x y")
    copies: Annotated[int, Field(ge=1)] = Field(
        default=1, description="how many samples there are of each component"
    )

    def build(self) -> Samples:
        components = [[self.steep, self.flat, sign * self.coupling] for sign in (1, -1)]
        inputs = np.repeat(np.array(components, dtype=np.float64), self.copies, axis=0)
        return Samples(inputs, np.zeros(len(inputs)), num_classes=None)


@models.register("valley")
class PointInValley(Settings):
    """Two parameters, theta = (x, y); the output for a sample is that component's loss."""

    start: tuple[float, float] = Field(default=(0.05, 1.0), description="x and y at the start")

    def build(self, inputs: InputShape, outputs: int) -> nn.Module:
        if inputs.shape != (3,) or inputs.vocabulary is not None:
            raise InvalidInput(
                f"model valley: inputs of shape {inputs.shape}, allowed: the coefficients (3,) of "
                "data set valley"
            )
        return _network(self.start)


def _network(start: tuple[float, float]) -> nn.Module:
    """theta = (x, y) at the start, and its losses."""
    import torch
    from torch import Tensor, nn

    class ValleyLosses(nn.Module):
        """theta = (x, y), a parameter (2,): the output is (a x^2 + b y^2) / 2 + c x y."""

        def __init__(self) -> None:
            super().__init__()
            # In float64: a start such as 0.05 is not a float32, and "the same start" would depend
            # on the dtype. `build_problem` converts it to that of the spec.
            self.theta = nn.Parameter(torch.tensor(start, dtype=torch.float64))

        def forward(self, coefficients: Tensor) -> Tensor:
            """Losses (n,) of components with coefficients (a, b, c), (n, 3)."""
            x, y = self.theta
            return coefficients @ torch.stack([x.square() / 2, y.square() / 2, x * y])

    return ValleyLosses()
