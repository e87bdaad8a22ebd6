"""The sharpness that mini-batch training feels: curvature along the mini-batch's own gradient.

    E_B[g_B^T H_B g_B] / E_B[norm(g_B)^2],   g_B and H_B gradient and Hessian of one batch B

Under SGD it is not lambda_1 of the full loss that rises to 2 / lr and hovers there, but this batch
sharpness; lambda_1 stays below. `batch_sharpness` estimates it anywhere, the probe of that name at
a step of training, over the mini-batches that all probes of the step share.

Source: Andreyev and Beneventano 2024 (arXiv 2412.20553); taken as a ratio of means.

Example:
    >>> import torch
    >>> from thalweg.loss.objective import Objective
    >>> data = (torch.randn(32, 3), torch.randn(32, 1))
    >>> objective = Objective(torch.nn.Linear(3, 1), torch.nn.MSELoss(), data)
    >>> found = batch_sharpness(objective, batch_size=4, batches=20, seed=0)
    >>> found.value > found.standard_error > 0
    True
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from thalweg.errors import invalid
from thalweg.loss.protocol import Loss
from thalweg.measure.directional_sharpness import curvature_along
from thalweg.measure.probes import Value, probe
from thalweg.measure.step_state import StepState
from thalweg.operators.hessian import Hessian


@dataclass(frozen=True)
class BatchSharpness:
    """A batch sharpness, estimated from some batches.

    Attributes:
        value: in units of the Hessian.
        standard_error: of `value`, over the draw of the batches; NaN for a single one.
        batch_size: samples in each batch.
        batches: how many were drawn.
    """

    value: float
    standard_error: float
    batch_size: int
    batches: int


def batch_sharpness(
    objective: Loss,
    batch_size: int,
    batches: int = 100,
    seed: int = 0,
    theta: Tensor | None = None,
) -> BatchSharpness:
    """E_B[g_B^T H_B g_B] / E_B[norm(g_B)^2], with gradient and Hessian of one batch B.

    Batches are drawn independently, each without replacement. The value is the ratio of the two
    means, its standard error by the delta method: that of the mean of
    (g_B^T H_B g_B - value norm(g_B)^2), over the mean of norm(g_B)^2. Costs a gradient and a
    product with the Hessian for each batch, on its samples alone.

    Args:
        objective: the loss.
        batch_size: from 1 to N.
        batches: how many to draw, >= 1.
        seed: of the draw.
        theta: the point (P,); None for the model's current parameters.

    Returns:
        The estimate; NaN where all gradients vanish.

    Raises:
        InvalidInput: a batch size or number of batches out of range.
        Diverged: the loss or a product is NaN or infinite.

    Source: Andreyev and Beneventano 2024 (arXiv 2412.20553); taken as a ratio of means.
    """
    if not 1 <= batch_size <= objective.num_samples:
        raise invalid("batch_size", batch_size, f"an integer from 1 to N = {objective.num_samples}")
    if batches < 1:
        raise invalid("batches", batches, "an integer >= 1")
    theta = objective.theta() if theta is None else theta
    generator = torch.Generator().manual_seed(seed)
    curvatures = torch.empty(batches, dtype=torch.float64, device="cpu")
    squares = torch.empty(batches, dtype=torch.float64, device="cpu")
    for number in range(batches):
        drawn = torch.randperm(objective.num_samples, generator=generator, device="cpu")[
            :batch_size
        ]
        # In ascending order the data is read forwards.
        samples = drawn.sort().values
        _, gradient = objective.value_and_gradient(theta, samples)
        curvatures[number], squares[number] = _terms(objective, theta, samples, gradient)
    value = curvatures.mean() / squares.mean()
    deviations = (curvatures - value * squares) / squares.mean()
    # The standard deviation of a single batch is unknown, and torch would warn of it.
    error = float(deviations.std() / batches**0.5) if batches > 1 else math.nan
    return BatchSharpness(float(value), error, batch_size, batches)


def _terms(
    objective: Loss, theta: Tensor, samples: Tensor | None, gradient: Tensor
) -> tuple[float, float]:
    """g_B^T H_B g_B and norm(g_B)^2 of one batch."""
    curvature, square = curvature_along(Hessian(objective, theta, samples), gradient[:, None])
    return float(curvature), float(square)


@probe("batch_sharpness", ["batch_sharpness"])
def batch_sharpness_of_state(state: StepState) -> Mapping[str, Value]:
    """E[g_B^T H_B g_B] / E[norm(g_B)^2], with gradient and Hessian of one mini-batch.

    As a ratio of means; compare with 2 / lr. Where every batch is all samples it is the curvature
    along the gradient. NaN where all gradients vanish.

    Source: Andreyev and Beneventano 2024 (arXiv 2412.20553).
    """
    curvature = square = 0.0
    for samples, gradient in zip(state.batch_samples, state.batch_gradients.T, strict=True):
        terms = _terms(state.objective, state.theta, samples, gradient)
        curvature, square = curvature + terms[0], square + terms[1]
    return {"batch_sharpness": curvature / square if square else math.nan}
