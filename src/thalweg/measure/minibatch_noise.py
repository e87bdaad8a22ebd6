"""Probes of what the draw of the mini-batch does to a step: its noise, critical learning rates.

Expectations over the draw are means over `BATCHES` mini-batches beside the step's own, the same for
all probes of a step.

Example:
    >>> import torch
    >>> from thalweg.loss.objective import Objective
    >>> from thalweg.spectrum.subspace import Subspace
    >>> from thalweg.tracking.source import FixedSubspace
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> data = (torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.zeros(2, 1))
    >>> objective = Objective(model, torch.nn.MSELoss(), data)
    >>> source = FixedSubspace(Subspace(torch.eye(2)[:, :1], torch.ones(1)))
    >>> batches = lambda number: [torch.tensor([n % 2]) for n in range(number)]
    >>> state = StepState(0, torch.ones(2), objective, source, learning_rate=0.1, batches=batches)
    >>> noise(state)  # gradients (8, 0) and (0, 2), their mean (4, 1)
    {'noise_share_dominant': 0.9411764705882353, 'noise_norm': 4.123105625617661}
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from thalweg.linalg import dots, squared_norm
from thalweg.measure.probes import Value, probe
from thalweg.measure.step_state import StepState
from thalweg.operators.hessian import Hessian


@probe("noise", ["noise_share_dominant", "noise_norm"], needs_gradient=True)
def noise(state: StepState) -> Mapping[str, Value]:
    """Fraction of the noise of the mini-batch gradient that lies in S_k, and the noise's size.

    With C the covariance of the mini-batch gradient g_B: trace(P_k C) / trace(C), as a ratio of
    means over mini-batches, and sqrt(trace(C)), in units of the gradient. The mean of g_B is the
    full gradient, so it isn't estimated. Not measured where every batch is all samples; NaN where
    all gradients are equal. In float64.
    """
    if state.batches is None:
        return {}
    deviations = state.batch_gradients - state.gradient[:, None]
    dominant = float(state.subspace.coordinates(deviations).double().square().sum())
    total = float(squared_norm(deviations.T.double()).sum())
    return {
        "noise_share_dominant": dominant / total if total else math.nan,
        "noise_norm": math.sqrt(total / deviations.shape[1]),
    }


@probe(
    "critical_learning_rates",
    ["critical_lr_dominant", "critical_lr_bulk"],
    needs_gradient=True,
)
def critical_learning_rates(state: StepState) -> Mapping[str, Value]:
    """The learning rate above which one projected step of SGD raises the expected loss.

    The step theta - lr Q g_B, with Q = P_k or I - P_k and g_B the gradient of a mini-batch, whose
    mean is the full gradient g, changes a loss with Hessian H in the mean by

        -lr norm(Q g)^2 + lr^2 / 2 E[(Q g_B)^T H (Q g_B)],

    which is zero at lr = 2 norm(Q g)^2 / E[(Q g_B)^T H (Q g_B)]. Between the two learning rates the
    one projection lowers the loss and the other raises it. Exact on a quadratic, else the change to
    second order. Infinite where the curvature is not positive. Where every batch is all samples,
    g_B = g. Momentum, preconditioning and SAM are left out: the columns are about SGD.

    Costs one product of 2m vectors with the Hessian over all samples, m the mini-batches. Sums in
    float64.

    Source: Deng et al. 2026 (arXiv 2601.11789), for quadratics: an interval of step sizes in which
    the bulk projection lowers the loss and the dominant one raises it.
    """
    subspace, gradients = state.subspace, state.batch_gradients
    block = torch.cat(subspace.split(gradients), dim=1)
    images = Hessian(state.objective, state.theta) @ block
    curvatures = dots(block.double(), images.double(), dim=0).reshape(2, -1).mean(1).tolist()
    squares = [float(squared_norm(part.double())) for part in state.parts(state.gradient)]
    row: dict[str, Value] = {}
    for name, square, curvature in zip(("dominant", "bulk"), squares, curvatures, strict=True):
        row[f"critical_lr_{name}"] = 2 * square / curvature if curvature > 0 else math.inf
    return row
