"""Probes of an optimizer's edge of stability, and of alignment in the metric of Adam and RMSprop.

Example:
    >>> import torch
    >>> from thalweg.loss.objective import Objective
    >>> from thalweg.spectrum.subspace import Subspace
    >>> from thalweg.tracking.source import FixedSubspace
    >>> model, data = torch.nn.Linear(2, 1), (torch.ones(4, 2), torch.ones(4, 1))
    >>> objective = Objective(model, torch.nn.MSELoss(), data)
    >>> source = FixedSubspace(Subspace(torch.eye(3)[:, :1], torch.tensor([5.0])))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> state = StepState(0, torch.zeros(3), objective, source, 0.1, optimizer=optimizer)
    >>> row = stability(state)
    >>> row["stability_threshold"], row["stability_ratio"]
    (20.0, 0.25)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from torch.optim import Optimizer

from thalweg.linalg import dots, norm
from thalweg.measure.probes import Value, probe
from thalweg.measure.step_state import StepState
from thalweg.operators.hessian import Hessian
from thalweg.optim.stability import StabilityThreshold, sam_threshold, stability_threshold
from thalweg.tracking.preconditioner import metric_of
from thalweg.tracking.wrapping import unwrapped


@probe("stability", ["stability_threshold", "preconditioned_sharpness", "stability_ratio"])
def stability(state: StepState) -> Mapping[str, Value]:
    """The optimizer's stability threshold at the step's learning rate, and how far it is reached.

    The ratio is that of the sharpness to the threshold: of lambda_1, or for Adam and RMSprop of the
    preconditioned sharpness, that of `StepState.metric_subspace`. Where no step was made, as at the
    last row of a run, there is no preconditioned sharpness. None: the optimizer has no threshold.

    With SAM around an optimizer its threshold s is reached at lambda (1 + rho lambda / norm(g)) =
    s: on a quadratic, the gradient at the perturbed point is that of a loss with the curvature on
    the left. That is `sam_threshold` with 2 / s in the place of lr. It is not known for the
    adaptive variant, nor in a metric.

    Source: Cohen et al. 2021 (arXiv 2103.00065), 2022 (2207.14484); SAM around gradient descent:
    Long and Bartlett 2024 (2309.12488).
    """
    if state.optimizer is None:
        return {}
    threshold = threshold_at(state, state.optimizer, lr=state.learning_rate)
    value = threshold.value
    metric = state.metric_subspace
    preconditioned = None if metric is None else float(metric.scaled.eigenvalues[0])
    # In a metric lambda_1 says nothing.
    sharpness = preconditioned
    if value is not None and not threshold.preconditioned:
        sharpness = float(state.subspace.eigenvalues[0])
    ratio = None
    if value is not None and value > 0 and sharpness is not None:
        ratio = sharpness / value
    return {
        "stability_threshold": value,
        "preconditioned_sharpness": preconditioned,
        "stability_ratio": ratio,
    }


@probe(
    "directional_stability",
    ["directional_curvature_own_metric", "directional_margin"],
    needs_gradient=True,
    quick=True,
)
def directional_stability(state: StepState) -> Mapping[str, Value]:
    """The curvature along the full gradient as the optimizer feels it, and how far from its edge.

        g^T D^-1 (H + w I) D^-1 g / (g^T D^-1 g),  margin 1 - curvature / threshold

    D and w are those of `metric_of`; D = 1 and w = 0 for an optimizer without a metric. Below a
    margin of 0 the next steps along the gradient grow: where the sharpness is beyond the edge but
    this is not, the gradient has not yet turned to the sharp direction. Costs one product with H.
    Not measured where no step was made, or the optimizer has no threshold.

    Source: Bai et al. 2025 (arXiv 2506.04805), as what foretells Adam's loss spikes.
    """
    if state.optimizer is None or not state.step_was_made:
        return {}
    threshold = threshold_at(state, state.optimizer, lr=state.learning_rate)
    direction, shift = state.gradient, 0.0
    if threshold.preconditioned:
        diagonal, shift = metric_of(state.optimizer, state.objective)
        direction = state.gradient / diagonal
    image = Hessian(state.objective, state.theta) @ direction + shift * direction
    length = float(dots(state.gradient, direction, dim=-1))
    curvature = float(dots(direction, image, dim=-1)) / length if length else math.nan
    value = threshold.value
    known = value is not None and 0 < value < math.inf
    return {
        "directional_curvature_own_metric": curvature,
        "directional_margin": 1 - curvature / value if known and value else None,
    }


@probe(
    "alignment_own_metric",
    ["alignment_gradient_own_metric", "alignment_proposed_own_metric"],
    needs_gradient=True,
)
def alignment_own_metric(state: StepState) -> Mapping[str, Value]:
    """chi_k of the full gradient and of the proposed update, in the metric of the optimizer.

    With D after the step's update and W the top eigenvectors of D^-1/2 H D^-1/2 at theta_t:
    norm(W^T D^-1/2 g) / norm(D^-1/2 g) and norm(W^T D^1/2 delta) / norm(D^1/2 delta), see
    `MetricSubspace`. Not measured where the optimizer has no such D, or no step was made.

    Source: Cohen et al. 2022 (arXiv 2207.14484) for the preconditioned Hessian.
    """
    metric = state.metric_subspace
    if metric is None or state.proposed is None:
        return {}
    return {
        "alignment_gradient_own_metric": metric.alignment_gradient(state.gradient),
        "alignment_proposed_own_metric": metric.alignment_update(state.proposed),
    }


def threshold_at(
    state: StepState, optimizer: Optimizer, lr: float | None = None
) -> StabilityThreshold:
    """The stability threshold of an optimizer at a step, that of SAM by the step's gradient.

    Args:
        state: the step, whose full gradient SAM's threshold depends on.
        optimizer, lr: as for `stability_threshold`.

    Raises:
        InvalidInput: the optimizer updates none of the parameters.
    """
    found = unwrapped(optimizer)
    threshold = stability_threshold(found.base, state.objective.parameters(), lr=lr)
    value = threshold.value
    if value is None or found.rho == 0 or math.isinf(value):
        return threshold
    if found.adaptive or threshold.preconditioned or value <= 0:
        return replace(threshold, value=None)
    return replace(
        threshold, value=sam_threshold(float(norm(state.gradient)), 2 / value, found.rho)
    )
