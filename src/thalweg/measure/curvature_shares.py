"""Probes of where vectors lie in the spectrum: shares above a curvature, without a gap and a k.

The Krylov spaces of the gradient, the mini-batch gradient and the proposed update are one, so that
each helps the others; shares are those of a smooth step of width 0.1 at each threshold.

Example:
    >>> import torch
    >>> from thalweg.loss.objective import Objective
    >>> from thalweg.spectrum.subspace import Subspace
    >>> from thalweg.tracking.source import FixedSubspace
    >>> data = (torch.diag(torch.tensor([3.0, 1.0])), torch.ones(2, 1))
    >>> objective = Objective(torch.nn.Linear(2, 1, bias=False), torch.nn.MSELoss(), data)
    >>> source = FixedSubspace(Subspace(torch.eye(2)[:, :1], torch.tensor([9.0])))
    >>> row = curvature_shares(StepState(0, torch.zeros(2), objective, source, learning_rate=0.1))
    >>> [round(tau, 2) for tau in row["share_curvatures"]]  # g = (-3, -1), H = diag(9, 1)
    [4.5, 1.8, 0.9, 0.45, 0.18]
    >>> [round(share, 2) for share in row["gradient_shares"]]
    [0.9, 0.9, 0.98, 1.0, 1.0]
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

from torch import Tensor

from thalweg.linalg import is_zero
from thalweg.measure.probes import Value, probe
from thalweg.measure.stability_probes import threshold_at
from thalweg.measure.step_state import StepState
from thalweg.operators.hessian import Hessian
from thalweg.operators.preconditioned import Preconditioned
from thalweg.spectrum.curvature_profile import WIDTH, CurvatureProfile, curvature_profiles
from thalweg.spectrum.eigensolver import NotConverged
from thalweg.spectrum.subspace import Subspace
from thalweg.tracking.preconditioner import metric_of
from thalweg.tracking.threshold_source import ThresholdSource

PARTS_OF_SHARPNESS = (0.5, 0.2, 0.1, 0.05, 0.02)
"""Thresholds as parts of the largest curvature seen."""
MULTIPLES_OF_EDGE = (0.25, 0.5, 1.0, 2.0)
"""Thresholds as multiples of the optimizer's stability threshold."""
CLEAR_GAP = 0.5
"""Of lambda_{k+1} / lambda_k: a smooth step between the two is then 2 % from a sharp one."""
ERROR = 0.01
MATVECS_A_VECTOR = 40
"""The most; what is less exact then says so in its error."""

Profiles = Mapping[str, CurvatureProfile]


@probe(
    "curvature_shares",
    [
        "share_curvatures",
        "gradient_shares",
        "minibatch_shares",
        "update_shares",
        "share_error",
        "gradient_curvature",
        "update_curvature",
        "update_curvature_spread",
    ],
    vectors=["share_curvatures", "gradient_shares", "minibatch_shares", "update_shares"],
    needs_gradient=True,
)
def curvature_shares(state: StepState) -> Mapping[str, Value]:
    """Shares of the gradient, the mini-batch gradient and the proposed update above curvatures.

    The thresholds are parts of the largest curvature seen, `PARTS_OF_SHARPNESS`, and in units of
    the Hessian in `share_curvatures`; shares are of the squared norm, with the largest estimated
    error in `share_error`. The curvature along the gradient and the update is v^T H v / norm(v)^2,
    with the spread of the update's spectral measure.
    """
    vectors = {"gradient": state.gradient}
    if state.step_was_made and state.minibatch_gradient is not None and state.proposed is not None:
        vectors |= {"minibatch": state.minibatch_gradient, "update": state.proposed}
    hessian = Hessian(state.objective, state.theta, keep_graph=True)
    profiles = _profiles(hessian, vectors, None)
    if not profiles:
        return {}
    sharpness = max(float(profile.nodes[-1]) for profile in profiles.values())
    if sharpness <= 0:
        return {}
    curvatures = [part * sharpness for part in PARTS_OF_SHARPNESS]
    row = _shares(profiles, curvatures, "{}_shares", "share_error")
    update = profiles.get("update")
    return {
        **row,
        "share_curvatures": curvatures,
        "gradient_curvature": profiles["gradient"].mean if "gradient" in profiles else None,
        "update_curvature": None if update is None else update.mean,
        "update_curvature_spread": None if update is None else update.spread,
    }


@probe(
    "edge_shares",
    ["gradient_edge_shares", "update_edge_shares", "edge_share_error", "update_edge_curvature"],
    vectors=["gradient_edge_shares", "update_edge_shares"],
    needs_gradient=True,
)
def edge_shares(state: StepState) -> Mapping[str, Value]:
    """Shares of the gradient and the proposed update beyond multiples of the edge of stability.

    The edge is the optimizer's own threshold, such as 2 / lr, and the spectrum that of the matrix
    which it is about: for Adam and RMSprop D^-1/2 (H + w I) D^-1/2, with D^-1/2 g for the gradient
    and D^1/2 delta for the update. The multiples are `MULTIPLES_OF_EDGE`. The curvature along the
    update is in units of the edge. Not measured where there is no threshold, or no step was made.

    Source: Cohen et al. 2021 (arXiv 2103.00065), 2022 (2207.14484) for the thresholds.
    """
    if state.optimizer is None or state.proposed is None or not state.step_was_made:
        return {}
    threshold = threshold_at(state, state.optimizer, lr=state.learning_rate)
    edge = threshold.value
    if edge is None or not 0 < edge < math.inf:
        return {}
    hessian = Hessian(state.objective, state.theta, keep_graph=True)
    vectors, operator = {"gradient": state.gradient, "update": state.proposed}, hessian
    if threshold.preconditioned:
        diagonal, shift = metric_of(state.optimizer, state.objective)
        operator = Preconditioned(hessian, diagonal, shift=shift)
        root = diagonal.sqrt()
        vectors = {"gradient": state.gradient / root, "update": root * state.proposed}
    curvatures = [multiple * edge for multiple in MULTIPLES_OF_EDGE]
    profiles = _profiles(operator, vectors, curvatures)
    update = profiles.get("update")
    return {
        **_shares(profiles, curvatures, "{}_edge_shares", "edge_share_error"),
        "update_edge_curvature": None if update is None else update.mean / edge,
    }


def alignments_above(state: StepState) -> Mapping[str, float]:
    """Alignments for where no gap is: square roots of the shares above lambda_k.

    In a gap they are chi_k; without one they are as well defined as with one. The subspace that is
    known is part of the Krylov space, so that products are spent on what it misses.

    Returns:
        `alignment_gradient`, `alignment_minibatch` and `alignment_update`, of the vectors that
        there are; nothing where lambda_k is not above 0.
    """
    known = state.subspace
    tau = float(known.eigenvalues[-1])
    if not tau > 0:
        return {}
    vectors = {
        "gradient": state.gradient,
        "minibatch": state.minibatch_gradient,
        "update": state.update,
    }
    found = {name: vector for name, vector in vectors.items() if vector is not None}
    hessian = Hessian(state.objective, state.theta, keep_graph=True)
    profiles = _profiles(hessian, found, [tau], known)
    shares = {name: profile.share_above(tau, WIDTH).value for name, profile in profiles.items()}
    return {f"alignment_{name}": max(0.0, share) ** 0.5 for name, share in shares.items()}


@probe(
    "share_at_gap",
    ["gradient_share_at_gap", "share_at_gap_error", "gap_ratio"],
    needs_gradient=True,
)
def share_at_gap(state: StepState) -> Mapping[str, Value]:
    """The gradient's share above sqrt(lambda_k lambda_{k+1}): chi_k^2 by another way.

    Only where lambda_{k+1} is below `CLEAR_GAP` lambda_k: elsewhere S_k is ill defined. The ratio
    of the two is measured wherever the subspace's source knows lambda_{k+1}.
    """
    last = float(state.subspace.eigenvalues[-1])
    following = state.source.report.next_eigenvalue
    if not (last > 0 and math.isfinite(following)):
        return {}
    row: dict[str, Value] = {"gap_ratio": following / last}
    if not 0 < following < CLEAR_GAP * last:
        return row
    tau = math.sqrt(last * following)
    hessian = Hessian(state.objective, state.theta, keep_graph=True)
    profiles = _profiles(hessian, {"gradient": state.gradient}, [tau])
    if not profiles:
        return row
    share = profiles["gradient"].share_above(tau, WIDTH)
    return row | {"gradient_share_at_gap": share.value, "share_at_gap_error": share.error}


@probe("split_threshold", ["split_threshold", "split_threshold_part"])
def split_threshold(state: StepState) -> Mapping[str, Value]:
    """The curvature tau at which the step's update was split, and as a part of the largest seen.

    Both in the metric of the split. Only where updates are split at a curvature.
    """
    source = getattr(state.optimizer, "source", None)
    if not (isinstance(source, ThresholdSource) and state.step_was_made):
        return {}
    tau, largest = float(source.threshold), float(source.subspace.eigenvalues[0])
    return {
        "split_threshold": tau,
        "split_threshold_part": tau / largest if largest > 0 else None,
    }


def _profiles(
    operator: Hessian | Preconditioned,
    vectors: Mapping[str, Tensor],
    thresholds: list[float] | None,
    known: Subspace | None = None,
) -> Profiles:
    """The profiles of the vectors that are not zero."""
    found = {name: vector for name, vector in vectors.items() if not is_zero(vector)}
    if not found:
        return {}
    with warnings.catch_warnings():
        # The row has the error that was reached.
        warnings.simplefilter("ignore", NotConverged)
        profiles = curvature_profiles(
            operator,
            list(found.values()),
            thresholds=thresholds,
            parts=PARTS_OF_SHARPNESS,
            error=ERROR,
            max_matvecs=MATVECS_A_VECTOR * len(found),
            known=known,
        )
    return dict(zip(found, profiles, strict=True))


def _shares(
    profiles: Profiles, curvatures: list[float], column: str, error: str
) -> dict[str, Value]:
    """A list of shares for each vector, and the largest of their errors."""
    row: dict[str, Value] = {}
    worst = 0.0
    for name, profile in profiles.items():
        shares = [profile.share_above(tau, WIDTH) for tau in curvatures]
        row[column.format(name)] = [share.value for share in shares]
        worst = max(worst, *(share.error for share in shares))
    return row | {error: worst}
