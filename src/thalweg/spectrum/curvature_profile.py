"""Where a vector lies in the spectrum of an operator: its spectral measure, without eigenvectors.

    mu_v(lambda) = sum_i (u_i . v)^2 delta(lambda - lambda_i) / norm(v)^2

A dominant subspace needs a gap below it; the measure is well defined without one. Some Lanczos
steps that begin at v give its Gauss quadrature, and from it the share of v above any curvature tau,
whose special case is chi_k(v)^2, for a tau within the gap between lambda_k and lambda_{k+1}.

Source: Golub, Meurant 2010, "Matrices, Moments and Quadrature with Applications"; how bounds and
errors come about: `compression.py`.

Example:
    >>> import torch
    >>> from thalweg.operators.symmetric import DenseOperator
    >>> operator = DenseOperator(torch.diag(torch.tensor([5.0, 2.0, 1.0, 0.0]).double()))
    >>> profile = curvature_profile(operator, torch.tensor([3.0, 0.0, 4.0, 0.0]).double())
    >>> profile.share_above(3.0)
    Share(0.36, from 0.36 to 0.36)
    >>> round(profile.mean, 4), round(profile.spread, 4), profile.num_matvecs  # 5 * 0.36 + 1 * 0.64
    (2.44, 1.92, 2)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thalweg.errors import invalid
from thalweg.loss.protocol import Loss
from thalweg.operators.hessian import as_operator
from thalweg.operators.loss_operator import LossOperator
from thalweg.operators.symmetric import OperatorAround, SymmetricOperator
from thalweg.spectrum.compression import Compression
from thalweg.spectrum.eigensolver import NotConverged
from thalweg.spectrum.lanczos import LanczosSpace
from thalweg.spectrum.subspace import Subspace
from thalweg.surroundings import shielded

# Parts of the largest curvature seen at which the share is to be known, where none are given.
USUAL_PARTS = (0.5, 0.2, 0.1)
# Width of the smooth step at tau, in units of tau.
WIDTH = 0.1
MAX_MATVECS = 200


@dataclass(frozen=True, repr=False)
class Share:
    """A part of norm(v)^2, in [0, 1], and between what it lies.

    Attributes:
        value: in the middle of a sharp step's bounds; of a smooth step the estimate.
        lower, upper: bounds of a sharp step; of a smooth one the estimate less and plus its error.
    """

    value: float
    lower: float
    upper: float

    @property
    def error(self) -> float:
        """The most that `value` is off by, where the bounds hold."""
        return max(self.upper - self.value, self.value - self.lower)

    def __float__(self) -> float:
        return self.value

    def __repr__(self) -> str:
        return f"Share({self.value:.4g}, from {self.lower:.4g} to {self.upper:.4g})"


@dataclass(frozen=True, repr=False)
class CurvatureProfile:
    """The Gauss quadrature of a vector's spectral measure, from which all else is computed.

    Tensors are float64 on the CPU; curvatures in units of the operator.

    Attributes:
        nodes: (m,), Ritz values, ascending; all lie inside the spectrum.
        weights: (m,), >= 0, of sum 1.
        length: norm(v).
        num_matvecs: vectors multiplied, for all vectors that were profiled together.
        converged: whether the target error was met.
        caveat: why bounds are estimates alone, in words; "" where they are bounds.

    Example: see the module.
    """

    nodes: Tensor
    weights: Tensor
    length: float
    num_matvecs: int
    converged: bool
    caveat: str
    _compression: Compression
    _coordinates: Tensor
    _rounding: float

    @property
    def mean(self) -> float:
        """v^T A v / norm(v)^2, the curvature along v."""
        return float(self.nodes @ self.weights)

    @property
    def spread(self) -> float:
        """The standard deviation of the measure: 0 where v is an eigenvector."""
        return math.sqrt(float(self.weights @ (self.nodes - self.mean).square()))

    def share_above(self, threshold: float, width: float | None = None) -> Share:
        """The part of norm(v)^2 that lies at curvatures above a threshold tau.

        Args:
            threshold: tau, in units of the operator.
            width: None for a sharp step, v^T 1[A > tau] v / norm(v)^2 with bounds; else of the
                logistic step 1 / (1 + exp(-(lambda - tau) / (width tau))), with an estimated error.

        Raises:
            InvalidInput: a threshold or a width that is no number, or not > 0 for a smooth step.
        """
        if not math.isfinite(threshold):
            raise invalid("threshold", threshold, "a finite number")
        if width is not None:
            check_threshold(threshold)
            check_width(width)
            found = self._compression.step(self._coordinates, threshold, width)
            error = found.mean_error + self._rounding / (width * threshold)
            return Share(found.mean, max(0.0, found.mean - error), min(1.0, found.mean + error))
        least, most = self._compression.step_bounds(self._coordinates, threshold)
        return Share((least + most) / 2, least, most)

    def __repr__(self) -> str:
        return (
            f"CurvatureProfile(mean={self.mean:.4g}, spread={self.spread:.4g}, from"
            f" {float(self.nodes[0]):.4g} to {float(self.nodes[-1]):.4g},"
            f" converged={self.converged}, num_matvecs={self.num_matvecs})"
        )


def curvature_profile(
    operator: SymmetricOperator | Loss,
    vector: Tensor,
    *,
    thresholds: Sequence[float] | None = None,
    parts: Sequence[float] = USUAL_PARTS,
    error: float = 0.01,
    width: float = WIDTH,
    max_matvecs: int = MAX_MATVECS,
    known: Subspace | None = None,
    keep_basis: bool = True,
) -> CurvatureProfile:
    """The spectral measure of one vector; arguments, errors and warnings of `curvature_profiles`.

    Args:
        vector: v, (P,), not zero.
    """
    return curvature_profiles(
        operator,
        [vector],
        thresholds=thresholds,
        parts=parts,
        error=error,
        width=width,
        max_matvecs=max_matvecs,
        known=known,
        keep_basis=keep_basis,
    )[0]


@shielded()
def curvature_profiles(
    operator: SymmetricOperator | Loss,
    vectors: Tensor | Sequence[Tensor],
    *,
    thresholds: Sequence[float] | None = None,
    parts: Sequence[float] = USUAL_PARTS,
    error: float = 0.01,
    width: float = WIDTH,
    max_matvecs: int = MAX_MATVECS,
    known: Subspace | None = None,
    keep_basis: bool = True,
) -> list[CurvatureProfile]:
    """The spectral measures of some vectors, such as gradient and update, from one Krylov space.

    Each step multiplies a block, a vector for each. Steps are made until the smooth share above
    each threshold is known to the target error, for every vector.

    Args:
        operator: anything with `shape`, `dtype`, `device` and `@` on a block (P, b); or a loss, for
            its Hessian at the parameters.
        vectors: (P,) each, or the columns of (P, b); none of them zero.
        thresholds: > 0, in units of the operator; None for `parts` of the largest curvature seen.
        parts: > 0 and at most 1.
        error: target, of the shares.
        width: of the step that the error is about, in units of the threshold.
        max_matvecs: the most vectors to multiply.
        known: eigenpairs that are known, nearly: the Krylov space has the rest to find.
        keep_basis: hold a vector (P,) for each product. Without, three for each vector are held and
            nothing is reorthogonalized.

    Returns:
        A profile for each vector.

    Raises:
        InvalidInput: a vector that is zero, not finite or of another length; a setting out of its
            range; an operator that is not symmetric.
        Diverged: a product is NaN or infinite.

    Warns:
        NotConverged: the target was not met.
    """
    operator = as_operator(operator)
    check_settings(error, width, max_matvecs)
    for threshold in thresholds or ():
        check_threshold(threshold)
    space = LanczosSpace(operator, _columns(vectors), known, keep_basis=keep_basis)

    def reached_by(seen: Compression) -> float:
        taus = thresholds or _parts_of_largest(seen, parts)
        return max(_error_at(seen, coordinates, taus) for coordinates in space.coordinates.T)

    def _error_at(seen: Compression, coordinates: Tensor, taus: Sequence[float]) -> float:
        if not taus:
            return seen.step_bounds(coordinates, 0.0)[1]
        steps = ((seen.step(coordinates, tau, width), tau) for tau in taus)
        return max(step.mean_error + space.rounding / (width * tau) for step, tau in steps)

    reached = space.grow_until(reached_by, error, max_matvecs)
    tell_if_not_converged("curvature_profile", reached, error, space.num_matvecs)
    caveat = estimate_caveat(operator, known, keep_basis=keep_basis)
    return profiles_of(space, converged=reached <= error, caveat=caveat)


def _columns(vectors: Tensor | Sequence[Tensor]) -> Tensor:
    """Vectors as the columns of (P, b)."""
    if isinstance(vectors, Tensor):
        return vectors
    shapes = [tuple(vector.shape) for vector in vectors]
    if not shapes or any(len(shape) != 1 for shape in shapes) or len(set(shapes)) > 1:
        raise invalid("vectors", shapes, "vectors (P,), at least one")
    return torch.stack(list(vectors), dim=1)


def profiles_of(space: LanczosSpace, *, converged: bool, caveat: str) -> list[CurvatureProfile]:
    """The profile of each vector that a space began with."""
    seen = space.compression()
    return [
        CurvatureProfile(
            *seen.quadrature(coordinates),
            float(length),
            space.num_matvecs,
            converged,
            caveat,
            seen,
            coordinates,
            space.rounding,
        )
        for coordinates, length in zip(space.coordinates.T, space.lengths, strict=True)
    ]


def check_threshold(threshold: float) -> None:
    """Refuse a curvature that is no threshold.

    Raises:
        InvalidInput: not > 0, or not finite.
    """
    if not (threshold > 0 and math.isfinite(threshold)):
        raise invalid("threshold", threshold, "a number > 0, in units of the operator")


def check_width(width: float) -> None:
    """Refuse a width that a smooth step cannot have.

    Raises:
        InvalidInput: not > 0.
    """
    if not width > 0:
        raise invalid("width", width, "a number > 0, in units of the threshold")


def check_settings(error: float, width: float, max_matvecs: int) -> None:
    """Refuse settings that no profile or split can be made with.

    Raises:
        InvalidInput: one is out of its range.
    """
    if not error > 0:
        raise invalid("error", error, "a number > 0")
    check_width(width)
    if max_matvecs < 1:
        raise invalid("max_matvecs", max_matvecs, "an integer >= 1")


def tell_if_not_converged(what: str, reached: float, error: float, num_matvecs: int) -> None:
    """Warn where the target error was not met.

    Warns:
        NotConverged: it was not.
    """
    if reached > error:
        warnings.warn(
            f"{what}: estimated error {reached:.2g} after {num_matvecs} products, {error:.2g} was"
            " asked for; raise max_matvecs, the threshold or the width",
            NotConverged,
            stacklevel=3,
        )


def estimate_caveat(
    operator: SymmetricOperator, known: Subspace | None, *, keep_basis: bool
) -> str:
    """Why bounds from products with this operator are estimates alone; "" where they are bounds."""
    reasons = []
    if operator.dtype != torch.float64:
        reasons.append(f"products are in {str(operator.dtype).removeprefix('torch.')}")
    inside = operator
    while isinstance(inside, OperatorAround):
        inside = inside.operator
    if isinstance(inside, LossOperator) and inside.samples is not None:
        reasons.append(f"over {len(inside.samples)} of {inside.objective.num_samples} samples")
    if known is not None:
        reasons.append("known eigenpairs are taken as they are")
    if not keep_basis:
        reasons.append("nothing is reorthogonalized")
    return "; ".join(reasons)


def _parts_of_largest(seen: Compression, parts: Sequence[float]) -> list[float]:
    """Parts of the largest curvature seen; none where there is no curvature above 0."""
    largest = float(torch.linalg.eigvalsh(seen.projected)[-1])
    return [part * largest for part in parts] if largest > 0 else []
