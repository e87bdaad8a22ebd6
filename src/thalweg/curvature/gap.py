"""Is the dominant subspace well defined? Only as far as lambda_k stands clear of lambda_{k+1}.

The error of a projector is that of the operator divided by lambda_k - lambda_{k+1}. Where the two
close up, eigenvectors of the bulk and of S_k mix at the least disturbance.

Example:
    >>> import torch
    >>> widest_gap(torch.tensor([9.0, 8.0, 7.5, 1.0, 0.9]))
    3
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from thalweg.curvature.eigensolver import NotConverged, top_eigenpairs
from thalweg.curvature.operators import SymmetricOperator

CLOSED = 0.95
"""lambda_{k+1} / lambda_k from which on a gap counts as closed."""
TOLERANCE = 0.05
MOST_PRODUCTS = 15
ROUNDING = 100


class GapClosed(UserWarning):
    """lambda_k and lambda_{k+1} are nearly equal: the subspace between them is ill defined."""


@dataclass(frozen=True)
class NextEigenpair:
    """The largest eigenpair below a subspace, from below.

    Attributes:
        value: a Rayleigh quotient, at most lambda_{k+1} of a converged subspace.
        vector: (P,), where to begin the next time.
        products: what it cost.
    """

    value: float
    vector: Tensor
    products: float


def next_eigenpair(
    operator: SymmetricOperator, rows: Tensor, largest: float, start: Tensor | None = None
) -> NextEigenpair:
    """lambda_{k+1}: the top eigenpair of the operator in the complement of a subspace.

    Args:
        operator: symmetric, (P, P).
        rows: an orthonormal basis of the subspace as rows (k, P).
        largest: lambda_1; what is below its rounding counts as zero.
        start: where to begin (P,), such as the last one found.
    """
    deflated = _Deflated(operator, rows, ROUNDING * torch.finfo(rows.dtype).eps * abs(largest))
    if start is not None:
        start = deflated.outside(start)
    with warnings.catch_warnings():
        # Not converged, it is a bound from below all the same.
        warnings.simplefilter("ignore", NotConverged)
        found = top_eigenpairs(
            deflated,
            1,
            tolerance=TOLERANCE,
            max_products=MOST_PRODUCTS,
            start=start,
            check_repeated=0,
        )
    return NextEigenpair(float(found.eigenvalues[0]), found.basis[:, 0], found.products)


def widest_gap(eigenvalues: Tensor) -> int:
    """The k for which lambda_k / lambda_{k+1} is largest among the positive eigenvalues given."""
    positive = eigenvalues[eigenvalues > 0]
    if len(positive) < 2:
        return 1
    return int((positive[:-1] / positive[1:]).argmax()) + 1


def warn_of_closed_gap(eigenvalues: Tensor, following: float) -> bool:
    """Whether the gap below the top k eigenvalues is closed; if so, say where it is wider.

    Warns:
        GapClosed
    """
    last = float(eigenvalues[-1])
    if not (following > CLOSED * last > 0):
        return False
    k = len(eigenvalues)
    wider = widest_gap(torch.cat([eigenvalues, eigenvalues.new_tensor([following])]))
    mend = f"; the gap is widest at k = {wider}" if wider != k else ""
    warnings.warn(
        f"lambda_{k} = {last:.4g} and lambda_{k + 1} = {following:.4g} close up: the dominant"
        f" subspace of dimension {k} is ill defined{mend}",
        GapClosed,
        stacklevel=4,
    )
    return True


class _Deflated:
    """(I - P) A (I - P) for the projector P on a subspace."""

    def __init__(self, operator: SymmetricOperator, rows: Tensor, rounding: float) -> None:
        self.operator = operator
        self.rows = rows
        self.rounding = rounding

    @property
    def shape(self) -> tuple[int, int]:
        return self.operator.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.operator.dtype

    @property
    def device(self) -> torch.device:
        return self.operator.device

    def outside(self, vectors: Tensor) -> Tensor:
        return vectors - self.rows.T @ (self.rows @ vectors)

    def __matmul__(self, vectors: Tensor) -> Tensor:
        images = self.outside(self.operator @ self.outside(vectors))
        # Noise of the subspace that was taken out is no operator, and not symmetric.
        return torch.where(images.norm(dim=0) > self.rounding, images, 0.0)
