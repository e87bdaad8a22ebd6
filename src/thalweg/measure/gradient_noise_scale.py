"""The gradient noise scale: the batch size at which noise and signal of a gradient are as large.

    B = trace(Sigma) / norm(g)^2

with g the gradient of the full loss and Sigma the covariance of the gradient of one sample. Far
below B samples, twice the batch is worth almost twice the steps; far above it, it is worth nothing.

The full gradient is known here, so that only trace(Sigma) is estimated, from batches drawn without
replacement: E[norm(g_b - g)^2] = trace(Sigma) / b * (N - b) / (N - 1).

Source: McCandlish et al. 2018 (arXiv 1812.06162), where g is estimated as well.

Example:
    >>> import torch
    >>> from thalweg.loss.objective import Objective
    >>> data = (torch.randn(64, 3), torch.randn(64, 1))
    >>> objective = Objective(torch.nn.Linear(3, 1), torch.nn.MSELoss(), data)
    >>> found = gradient_noise_scale(objective, batch_size=4, batches=20)
    >>> found.value > found.standard_error > 0, found.cost  # 1 + 20 * 4 / 64
    (True, 2.25)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thalweg.errors import invalid
from thalweg.linalg import squared_norm
from thalweg.loss.protocol import Loss
from thalweg.measure.probes import Value, probe
from thalweg.measure.step_state import BATCHES, StepState

# Of all samples, what the batches of a report take together: a quarter of a gradient.
SHARE_OF_SAMPLES = 0.25


@dataclass(frozen=True)
class GradientNoiseScale:
    """A gradient noise scale, estimated from some batches.

    Attributes:
        value: B, in samples; NaN where the full gradient vanishes.
        standard_error: of `value`, over the draw of the batches; NaN for a single one.
        trace: of the covariance of one sample's gradient.
        squared_norm: of the full gradient.
        batch_size: samples in each batch.
        batches: how many were drawn.
        cost: in gradients of the full loss.
    """

    value: float
    standard_error: float
    trace: float
    squared_norm: float
    batch_size: int
    batches: int
    cost: float


def gradient_noise_scale(
    objective: Loss,
    batch_size: int,
    batches: int = 50,
    seed: int = 0,
    theta: Tensor | None = None,
    *,
    gradient: Tensor | None = None,
) -> GradientNoiseScale:
    """trace(Sigma) / norm(g)^2, with Sigma the covariance of the gradient of one sample.

    Batches are drawn independently, each without replacement. Where samples count differently in
    the mean (tokens, class weights) a batch is taken for a mean over samples.

    Args:
        objective: the loss.
        batch_size: from 1 to N - 1; the value does not depend on it, but for chance.
        batches: how many to draw, >= 1.
        seed: of the draw.
        theta: the point (P,); None for the model's current parameters.
        gradient: of all samples there (P,), where it is known.

    Raises:
        InvalidInput: a batch size or number of batches out of range.
        Diverged: the loss or a gradient is NaN or infinite.

    Source: McCandlish et al. 2018 (arXiv 1812.06162). Example: see the module.
    """
    count = objective.num_samples
    if not 1 <= batch_size < count:
        raise invalid("batch_size", batch_size, f"an integer from 1 to N - 1 = {count - 1}")
    if batches < 1:
        raise invalid("batches", batches, "an integer >= 1")
    theta = objective.theta() if theta is None else theta
    cost = batches * batch_size / count
    if gradient is None:
        gradient, cost = objective.value_and_gradient(theta)[1], cost + 1
    generator = torch.Generator().manual_seed(seed)
    drawn = (torch.randperm(count, generator=generator, device="cpu") for _ in range(batches))
    squares = [
        # In ascending order the data is read forwards.
        _squared_distance(objective, theta, some[:batch_size].sort().values, gradient)
        for some in drawn
    ]
    return _of(squares, float(squared_norm(gradient.double())), batch_size, count, cost)


def _squared_distance(objective: Loss, theta: Tensor, samples: Tensor, gradient: Tensor) -> float:
    """norm(g_b - g)^2 of one batch."""
    deviation = objective.value_and_gradient(theta, samples)[1] - gradient
    return float(squared_norm(deviation.double()))


def _of(
    squares: Sequence[float], squared: float, batch_size: int, count: int, cost: float
) -> GradientNoiseScale:
    """The scale, from the squared distances of the batches' gradients to the full one."""
    found = torch.tensor(squares, dtype=torch.float64, device="cpu")
    # Batches without replacement scatter less, and all samples not at all.
    traces = found * batch_size * (count - 1) / (count - batch_size)
    trace = float(traces.mean())
    spread = float(traces.std()) / len(squares) ** 0.5 if len(squares) > 1 else math.nan
    value, error = (trace / squared, spread / squared) if squared else (math.nan, math.nan)
    return GradientNoiseScale(value, error, trace, squared, batch_size, len(squares), cost)


@probe(
    "gradient_noise_scale",
    ["gradient_noise_scale", "gradient_noise_scale_error"],
    needs_gradient=True,
    quick=True,
)
def gradient_noise_scale_of_state(state: StepState) -> Mapping[str, Value]:
    """trace(Sigma) / norm(g)^2 in samples, and its standard error over the draw of batches.

    By the mini-batches that all probes of the step share, see `StepState.batch_samples`; where
    there are none (every batch is all samples, or they are not known, as in `watch`), by batches of
    its own, a function of the step, that cost a quarter of a gradient. Not measured on one sample.

    Source: McCandlish et al. 2018 (arXiv 1812.06162).
    """
    count = state.objective.num_samples
    if count < 2:
        return {}
    shared = [samples for samples in state.batch_samples if samples is not None]
    if shared and len(shared[0]) < count:
        deviations = (state.batch_gradients - state.gradient[:, None]).T
        squares = [float(squared_norm(one.double())) for one in deviations]
        squared = float(squared_norm(state.gradient.double()))
        found = _of(squares, squared, len(shared[0]), count, cost=0.0)
    else:
        size = max(1, int(SHARE_OF_SAMPLES * count / BATCHES))
        found = gradient_noise_scale(
            state.objective, size, BATCHES, state.step, state.theta, gradient=state.gradient
        )
    return {
        "gradient_noise_scale": found.value,
        "gradient_noise_scale_error": found.standard_error,
    }
