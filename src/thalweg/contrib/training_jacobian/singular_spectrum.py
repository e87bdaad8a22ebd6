"""Singular values of a training Jacobian: what training amplifies, what it keeps, what it forgets.

J = U diag(sigma) V^T. A change of theta_0 along v_i becomes sigma_i times one of theta_T along
u_i: *chaotic* for sigma > 1 + eps, *stable* for sigma < 1 - eps, and the *bulk* between. How near 1
is "about 1" is a choice that changes the counts, so every question takes eps.

Source: Belrose, Scherlis 2024 (arXiv 2412.07003).

Example:
    >>> import torch
    >>> spectrum = singular_spectrum(torch.diag(torch.tensor([3.0, 1.0, 1.0005, 0.2])))
    >>> spectrum.parts(1e-2), spectrum.parts(1e-6)
    (Parts(chaotic=1, bulk=2, stable=1), Parts(chaotic=2, bulk=1, stable=1))
    >>> spectrum.bulk(1e-2).overlap(spectrum.bulk(1e-2, side="left"))
    1.0
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from thalweg.contrib.training_jacobian.jacobian import TrainingJacobian
from thalweg.contrib.training_jacobian.polar_decomposition import svd_by_polar
from thalweg.errors import Diverged, invalid
from thalweg.operators.symmetric import SymmetricOperator
from thalweg.spectrum.subspace import Subspace

THRESHOLDS = (1e-2, 1e-3, 1e-6)
"""Distances from 1 that reports of the bulk use."""

Side = Literal["left", "right"]


class Parts(NamedTuple):
    """How many singular values are above, about, and below 1."""

    chaotic: int
    bulk: int
    stable: int


@dataclass(frozen=True)
class SingularSpectrum:
    """The singular value decomposition of J, in float64.

    Attributes:
        values: sigma, (P,), descending, no unit.
        left: U, (P, P), directions of theta_T as columns.
        right: V, (P, P), directions of theta_0 as columns.

    Example: see the module.
    """

    values: Tensor
    left: Tensor
    right: Tensor

    def parts(self, threshold: float) -> Parts:
        """Counts of sigma > 1 + eps, abs(sigma - 1) <= eps, and sigma < 1 - eps.

        Raises:
            InvalidInput: a threshold outside (0, 1).
        """
        self._refuse(threshold)
        chaotic = int((self.values - 1 > threshold).sum())
        stable = int((1 - self.values > threshold).sum())
        return Parts(chaotic, len(self.values) - chaotic - stable, stable)

    def bulk(self, threshold: float, side: Side = "right") -> Subspace:
        """Span of the singular vectors with abs(sigma - 1) <= eps, sigma as `eigenvalues`.

        Of theta_0 (side "right") or theta_T ("left"). `overlap` of two of them is the mean squared
        cosine; two random subspaces of dimensions k <= m in P have m / P in the mean.

        Raises:
            InvalidInput: a threshold outside (0, 1), or no singular value that near to 1.
        """
        self._refuse(threshold)
        inside = torch.nonzero((self.values - 1).abs() <= threshold).flatten()
        if not len(inside):
            nearest = float((self.values - 1).abs().min())
            raise invalid("threshold", threshold, f"{nearest:.1e} or more, the nearest sigma to 1")
        return self._span(inside, side)

    def nearest_to_one(self, k: int, side: Side = "right") -> Subspace:
        """Span of the k singular vectors with the smallest abs(sigma - 1); see `bulk`.

        Raises:
            InvalidInput: k is not from 1 to P.
        """
        if not 1 <= k <= len(self.values):
            raise invalid("k", k, f"an integer from 1 to P = {len(self.values)}")
        nearest = (self.values - 1).abs().argsort(stable=True)[:k]
        return self._span(nearest.sort().values, side)

    @property
    def cosines(self) -> Tensor:
        """<u_i, v_i>, (P,): 1 where training leaves a direction as it is."""
        return (self.left * self.right).sum(0)

    def _span(self, indices: Tensor, side: Side) -> Subspace:
        vectors = self.right if side == "right" else self.left
        return Subspace(vectors[:, indices], self.values[indices])

    def _refuse(self, threshold: float) -> None:
        if not 0 < threshold < 1:
            raise invalid("threshold", threshold, "a number between 0 and 1")


def singular_spectrum(jacobian: TrainingJacobian | Tensor) -> SingularSpectrum:
    """The singular value decomposition of the whole J, always in float64: float32 can fail.

    Args:
        jacobian: of all directions; or a matrix (P, P).

    Raises:
        InvalidInput: J times some directions only, or a matrix that is not square.
        Diverged: it holds NaN or infinite values.
    """
    matrix = jacobian if isinstance(jacobian, Tensor) else jacobian.columns
    partial = isinstance(jacobian, TrainingJacobian) and jacobian.directions is not None
    if partial or matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
        given = f"{tuple(matrix.shape)}{' of given directions' if partial else ''}"
        hint = "call training_jacobian with directions=None"
        raise invalid("jacobian", given, "the whole of J, (P, P)", hint)
    if not bool(torch.isfinite(matrix).all()):
        raise Diverged("the training Jacobian holds NaN or infinite values")
    decompose = svd_by_polar if matrix.is_cuda else torch.linalg.svd
    left, values, right = decompose(matrix.double())
    return SingularSpectrum(values, left, right.T)


def flattest_directions(operator: SymmetricOperator, k: int) -> Subspace:
    """The k eigenvectors with the smallest abs(lambda): the bulk of a Hessian, all of it.

    Computed from the whole matrix: for the small P of a training Jacobian.

    Args:
        operator: such as a `Hessian`, (P, P).
        k: 1 <= k <= P.

    Returns:
        A `Subspace` in float64, eigenvalues descending.

    Raises:
        InvalidInput: k is out of range.

    Example:
        >>> from thalweg.operators.symmetric import DenseOperator
        >>> hessian = DenseOperator(torch.diag(torch.tensor([5.0, 0.1, -0.2, -3.0])))
        >>> [round(value, 3) for value in flattest_directions(hessian, 2).eigenvalues.tolist()]
        [0.1, -0.2]
    """
    size = operator.shape[0]
    if not 1 <= k <= size:
        raise invalid("k", k, f"an integer from 1 to P = {size}")
    matrix = operator @ torch.eye(size, dtype=operator.dtype, device=operator.device)
    values, vectors = torch.linalg.eigh((matrix + matrix.T).double() / 2)
    chosen = values.abs().argsort(stable=True)[:k].sort(descending=True).values
    return Subspace(vectors[:, chosen], values[chosen])
