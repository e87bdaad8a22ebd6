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
    grow,
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
    if vector.shape != (operator.shape[0],):
        raise invalid("vector", tuple(vector.shape), f"(P,) with P={operator.shape[0]}")
    if not bool(vector.any()):
        nothing = torch.zeros_like(vector)
        return ThresholdSplit(nothing, nothing.clone(), threshold, 0.0, 0, True, None)
    if diagonal is not None:
        refuse_unfit_diagonal(diagonal, operator.shape[0], operator.device)
        operator = Preconditioned(operator, diagonal)
    scaled = vector if diagonal is None else to_metric(vector, diagonal)
    space = LanczosSpace(operator, scaled[:, None], known, keep_basis=keep_basis)
    own = _error_of(known, scaled)

    def reached_by(seen: Compression) -> float:
        found = seen.step(space.coordinates[:, 0], threshold, width)
        return math.hypot(found.error, own) + space.rounding / (width * threshold)

    reached = grow(space, reached_by, error, max_matvecs)
    tell_if_not_converged("split_at", reached, error, space.num_matvecs)
    seen, coordinates = space.compression(), space.coordinates[:, 0]
    inside = seen.step(coordinates, threshold, width).coordinates
    above = (space.combine(inside) * float(space.lengths[0])).to(vector.dtype)
    above = above if diagonal is None else from_metric(above, diagonal)
    profile = CurvatureProfile(
        *seen.quadrature(coordinates),
        float(space.lengths[0]),
        space.num_matvecs,
        reached <= error,
        estimate_caveat(operator, known, keep_basis=keep_basis),
        seen,
        coordinates,
        space.rounding,
    )
    return ThresholdSplit(
        above, vector - above, threshold, reached, space.num_matvecs, reached <= error, profile
    )


def _error_of(known: Subspace | None, vector: Tensor) -> float:
    own = 0.0 if known is None else known.error(vector)
    return 0.0 if math.isnan(own) else own
