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

from thalweg.errors import invalid
from thalweg.operators.symmetric import SymmetricOperator
from thalweg.spectrum.eigensolver import NotConverged, top_eigenpairs
from thalweg.spectrum.multiplicity import Deflated, rounding_of

CLOSED = 0.95
"""lambda_{k+1} / lambda_k from which on a gap counts as closed."""
VANISHED = 1e-6
"""Of lambda_1: an eigenvalue that is zero but for rounding."""
TOLERANCE = 0.05
MOST_MATVECS = 15


class GapClosed(UserWarning):
    """lambda_k and lambda_{k+1} are nearly equal: the subspace between them is ill defined.

    From `CLOSED` on, lambda_{k+1} / lambda_k >= 0.95. The message names the k of the widest gap.

    Source: Davis, Kahan 1970, "The rotation of eigenvectors by a perturbation. III".

    Example:
        >>> import warnings
        >>> warnings.simplefilter("ignore", GapClosed)  # where the gap does not matter to you
    """


@dataclass(frozen=True)
class NextEigenpair:
    """The largest eigenpair below a subspace, from below.

    Attributes:
        value: a Rayleigh quotient, at most lambda_{k+1} of a converged subspace.
        vector: (P,), where to begin the next time.
        num_matvecs: what it cost.
    """

    value: float
    vector: Tensor
    num_matvecs: float


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
    deflated = Deflated(operator, rows, rounding_of(rows, largest))
    if start is not None:
        start = deflated.outside(start)
    with warnings.catch_warnings():
        # Not converged, it is a bound from below all the same.
        warnings.simplefilter("ignore", NotConverged)
        found = top_eigenpairs(
            deflated,
            1,
            tolerance=TOLERANCE,
            max_matvecs=MOST_MATVECS,
            start=start,
            check_repeated=0,
        )
    return NextEigenpair(float(found.eigenvalues[0]), found.basis[:, 0], found.num_matvecs)


def widest_gap(eigenvalues: Tensor) -> int:
    """The k for which lambda_k / lambda_{k+1} is largest among the positive eigenvalues given.

    Args:
        eigenvalues: (n,), descending, such as those of `top_eigenpairs`; of any unit.

    Returns:
        k, from 1 to n - 1; 1 where fewer than two are positive. The gap below the last one given
        is not known, so ask for a few more than k could be.

    Raises:
        InvalidInput: not one-dimensional, empty, NaN, or not descending.

    Source: the number of outliers as the place of the spectrum's widest gap, as Sagun et al. 2016
    (arXiv 1611.07476) and Gur-Ari et al. 2018 (arXiv 1812.04754) read it off.

    Example:
        >>> widest_gap(torch.tensor([5.0, 4.0, 0.5, 0.4, -2.0]))
        2
    """
    if eigenvalues.dim() != 1 or not len(eigenvalues):
        raise invalid("eigenvalues", tuple(eigenvalues.shape), "a shape (n,), n >= 1")
    if not bool((eigenvalues[:-1] >= eigenvalues[1:]).all()) or bool(eigenvalues.isnan().any()):
        raise invalid("eigenvalues", eigenvalues.tolist(), "numbers in descending order")
    positive = eigenvalues[eigenvalues > 0]
    if len(positive) < 2:
        return 1
    return int((positive[:-1] / positive[1:]).argmax()) + 1


@dataclass(frozen=True)
class Gap:
    """How clearly lambda_k stands above lambda_{k+1}.

    Attributes:
        eigenvalues: lambda_1 to lambda_k, descending, (k,).
        below: lambda_{k+1}, from below; NaN where not known.

    Example:
        >>> gap = Gap(torch.tensor([9.0, 8.0, 1.0]), below=0.99)
        >>> gap.closed, gap.widest
        (True, 2)
    """

    eigenvalues: Tensor
    below: float

    @property
    def last(self) -> float:
        """lambda_k."""
        return float(self.eigenvalues[-1])

    @property
    def closed(self) -> bool:
        """Whether the two are so close, or lambda_k so small, that S_k is ill defined."""
        vanished = not abs(self.last) > VANISHED * abs(float(self.eigenvalues[0]))
        return vanished or self.below > CLOSED * self.last > 0

    @property
    def widest(self) -> int:
        """The k of the widest gap among the eigenvalues known."""
        known = self.eigenvalues.double().cpu()
        known = torch.cat([known, known.new_tensor([self.below])])
        # lambda_{k+1} can have overtaken lambda_k.
        return widest_gap(known[~known.isnan()].sort(descending=True).values)

    def hint(self) -> str:
        """Another k, where that has a wider gap: "; k = 2 has the widest gap"."""
        return f"; k = {self.widest} has the widest gap" if self.widest != self.k else ""

    def caveat(self) -> str:
        """Where it is closed: that no cost would give more, and another k; else ""."""
        if not self.closed:
            return ""
        return (
            f"ill defined at k = {self.k}: lambda_{self.k} = {self.last:.4g} and"
            f" lambda_{self.k + 1} = {self.below:.4g} close up{self.hint()}"
        )

    @property
    def k(self) -> int:
        """How many eigenvalues are above the gap."""
        return len(self.eigenvalues)

    def warn(self, stacklevel: int) -> None:
        """Say that it is closed.

        Args:
            stacklevel: as for `warnings.warn`, seen from the caller.

        Warns:
            GapClosed: always.
        """
        warnings.warn(
            f"lambda_{self.k} = {self.last:.4g} and lambda_{self.k + 1} = {self.below:.4g} close"
            f" up: the dominant subspace of dimension {self.k} is ill defined{self.hint()}",
            GapClosed,
            stacklevel=stacklevel + 1,
        )
