"""Noise of mini-batches, whole or one part of it, injected into the gradient of a step.

scale Q (g_B - g), g_B the gradient of the mini-batch B that the step would have drawn, g that of
the full loss at the same point, Q the identity, P_k or I - P_k with S_k at theta_t. Both gradients
are of the same function, that of the full loss (batch norm with fixed statistics, no dropout), so
that the mean over batches is zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from thalweg.lab.training.minibatches import minibatch
from thalweg.loss.objective import Objective
from thalweg.measure.step_state import StepState

if TYPE_CHECKING:
    from thalweg.lab.config import NoiseSpec


def injected_noise(moment: StepState, noise: NoiseSpec, seed: int, theta: Tensor) -> Tensor:
    """The noise at theta (P,), such as theta_t or SAM's perturbed point; (P,).

    With part "all" and scale 1, the full gradient plus this is the gradient of the mini-batch.

    Raises:
        Diverged: a gradient or the loss is NaN or infinite.
    """
    objective = moment.objective
    samples = minibatch(seed, moment.step, noise.batch_size, objective.num_samples)
    at_start = torch.equal(theta, moment.theta)
    full = moment.gradient if at_start else objective.gradient(theta)
    difference = objective.gradient(theta, samples) - full
    if noise.part == "all":
        return noise.scale * difference
    dominant, bulk = moment.parts(difference)
    return noise.scale * (dominant if noise.part == "dominant" else bulk)


def add_to_gradients(objective: Objective, model: nn.Module, vector: Tensor) -> None:
    """Add a vector (P,) to the `grad` of the model's parameters."""
    parameters = objective.layout.parameters(model)
    for parameter, part in zip(parameters, objective.layout.unflatten(vector), strict=True):
        parameter.grad = part.clone() if parameter.grad is None else parameter.grad + part
