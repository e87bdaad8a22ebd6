"""Split a vector at a curvature tau: where no gap is, and so no dominant subspace.

The part above is f(A) v, with f a smooth step at tau, the part below v - f(A) v. There is no k, no
basis and no gap: both are well defined however close the eigenvalues are. Directions of negative
curvature count as below, however strong. Within a gap much wider than the step, f(A) is P_k.

Source: spectral filters by Lanczos (Golub, Meurant 2010, "Matrices, Moments and Quadrature with
Applications", chapter 8); how the error comes about: `compression.py`.

Example:
    >>> import torch
    >>> from thalweg.operators.symmetric import DenseOperator
    >>> operator = DenseOperator(torch.diag(torch.tensor([5.0, 2.0, 1.0, 0.0]).double()))
    >>> parts = split_at(operator, torch.tensor([3.0, 0.0, 4.0, 0.0]).double(), threshold=3.0)
    >>> parts.above.round(decimals=2).tolist(), parts.below.round(decimals=2).tolist()
    ([3.0, 0.0, 0.01, 0.0], [0.0, 0.0, 3.99, 0.0])
    >>> parts.num_matvecs, parts.error < 1e-12
    (2, True)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from thalweg.errors import invalid
from thalweg.linalg import is_zero, length
from thalweg.loss.protocol import Loss
from thalweg.operators.hessian import as_operator
from thalweg.operators.preconditioned import Preconditioned, refuse_unfit_diagonal
from thalweg.operators.symmetric import SymmetricOperator
from thalweg.spectrum.compression import Compression
from thalweg.spectrum.curvature_profile import (
    MAX_MATVECS,
    WIDTH,
    CurvatureProfile,
    check_settings,
    check_threshold,
    estimate_caveat,
    profiles_of,
    tell_if_not_converged,
)
from thalweg.spectrum.lanczos import LanczosSpace
from thalweg.spectrum.metric_subspace import from_metric, to_metric
from thalweg.spectrum.subspace import Subspace
from thalweg.surroundings import shielded


@dataclass(frozen=True)
class ThresholdSplit:
    """A vector in its parts above and below a curvature.

    Attributes:
        above: f(A) v, (P,), in the vector's dtype and unit.
        below: v - f(A) v, (P,).
        threshold: tau, in units of the operator.
        error: estimated norm of the error of either part, relative to norm(v); in a metric both
            norms are the metric's.
        num_matvecs: vectors multiplied by the operator.
        converged: whether the target error was met.
        profile: the spectral measure of the vector, from the same products; None for the zero
            vector.
    """

    above: Tensor
    below: Tensor
    threshold: float
    error: float
    num_matvecs: int
    converged: bool
    profile: CurvatureProfile | None


@shielded()
def split_at(
    operator: SymmetricOperator | Loss,
    vector: Tensor,
    threshold: float,
    *,
    relative: bool = False,
    width: float = WIDTH,
    error: float = 0.01,
    max_matvecs: int = MAX_MATVECS,
    diagonal: Tensor | None = None,
    known: Subspace | None = None,
    keep_basis: bool = True,
) -> ThresholdSplit:
    """Split a vector into its parts above and below a curvature; products until the error is met.

    Args:
        operator: A, anything with `shape`, `dtype`, `device` and `@` on a block (P, b); or a loss,
            for its Hessian at the parameters.
        vector: v, (P,). The zero vector has two zero parts, without a product.
        threshold: tau > 0, in units of the operator (in a metric: of D^-1/2 A D^-1/2).
        relative: take the threshold as a part of the largest curvature seen from v, which is
            lambda_1 where v has a part along u_1.
        width: of the smooth step 1 / (1 + exp(-(lambda - tau) / (width tau))).
        error: target, of either part, relative to norm(v).
        max_matvecs: the most products.
        diagonal: D (P,), positive: split an *update* in the metric of D, such as Adam's, by
            D^-1/2 f(D^-1/2 A D^-1/2) D^1/2; None for the Euclidean split.
        known: eigenpairs of A (in a metric of D^-1/2 A D^-1/2) that are known, nearly, such as a
            tracker's. The Krylov space has only the rest to find; their own error, as far as they
            know it, is part of the result's.
        keep_basis: hold a vector (P,) for each product. Without, three are held, nothing is
            reorthogonalized, and each product is made twice.

    Raises:
        InvalidInput: a vector that is not finite or of another length; a setting out of its range;
            an operator that is not symmetric.
        Diverged: a product is NaN or infinite.

    Warns:
        NotConverged: the target was not met.
    """
    operator = as_operator(operator)
    check_settings(error, width, max_matvecs)
    check_threshold(threshold)
    if vector.dim() != 1 or length(vector) != operator.shape[0]:
        raise invalid("vector", tuple(vector.shape), f"(P,) with P={operator.shape[0]}")
    if is_zero(vector):
        nothing = torch.zeros_like(vector)
        return ThresholdSplit(nothing, nothing.clone(), threshold, 0.0, 0, True, None)
    if diagonal is not None:
        refuse_unfit_diagonal(diagonal, operator.shape[0], operator.device)
        operator = Preconditioned(operator, diagonal)
    scaled = vector if diagonal is None else to_metric(vector, diagonal)
    space = LanczosSpace(operator, scaled[:, None], known, keep_basis=keep_basis)
    found = filter_start(
        space,
        threshold,
        relative=relative,
        width=width,
        error=error,
        max_matvecs=max_matvecs,
        own_error=_error_of(known, scaled),
    )
    tell_if_not_converged("split_at", found.error, error, space.num_matvecs)
    above = (found.above * float(space.lengths[0])).to(vector.dtype)
    above = above if diagonal is None else from_metric(above, diagonal)
    converged = found.error <= error
    caveat = estimate_caveat(operator, known, keep_basis=keep_basis)
    return ThresholdSplit(
        above,
        vector - above,
        found.threshold,
        found.error,
        space.num_matvecs,
        converged,
        profiles_of(space, converged=converged, caveat=caveat)[0],
    )


@dataclass(frozen=True)
class Filtered:
    """The part of a unit vector above a curvature.

    Attributes:
        above: f(A) v, (P,).
        threshold: tau.
        error: estimated, relative to norm(v).
    """

    above: Tensor
    threshold: float
    error: float


def filter_start(
    space: LanczosSpace,
    threshold: float,
    *,
    relative: bool,
    width: float,
    error: float,
    max_matvecs: int,
    own_error: float = 0.0,
) -> Filtered:
    """Grow the Krylov space of one vector until its part above tau has the target error.

    Args:
        space: of one start; further products are added to those it has.
        own_error: of what the space was given, such as known eigenpairs.

    The other arguments are those of `split_at`.
    """

    def step(seen: Compression) -> tuple[Tensor, float, float]:
        tau = threshold
        if relative:
            tau *= float(torch.linalg.eigvalsh(seen.projected)[-1])
        coordinates = space.coordinates[:, 0]
        if tau <= 0:
            # No curvature above 0 was seen: all is below.
            return torch.zeros_like(coordinates), tau, seen.step_bounds(coordinates, 0.0)[1] ** 0.5
        found = seen.step(coordinates, tau, width)
        reached = math.hypot(found.error, own_error) + space.rounding / (width * tau)
        return found.coordinates, tau, reached

    space.grow_until(lambda seen: step(seen)[2], error, max_matvecs)
    inside, tau, reached = step(space.compression())
    return Filtered(space.combine(inside), tau, reached)


def _error_of(known: Subspace | None, vector: Tensor) -> float:
    own = 0.0 if known is None else known.error(vector)
    return 0.0 if math.isnan(own) else own
