"""Is the dominant subspace well defined? Only as far as lambda_k stands clear of lambda_{k+1}.

The error of a projector is that of the operator divided by lambda_k - lambda_{k+1}. Where the two
close up, eigenvectors of the bulk and of S_k mix at the least disturbance.

Example:
    >>> import torch
    >>> widest_gap(torch.tensor([9.0, 8.0, 7.5, 1.0, 0.9]))
    3
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thalweg.errors import invalid
from thalweg.operators.symmetric import SymmetricOperator
from thalweg.spectrum.eigensolver import NotConverged, top_eigenpairs
from thalweg.spectrum.multiplicity import Deflated, rounding_of

CLOSED = 0.95
"""lambda_{k+1} / lambda_k from which on a gap counts as closed."""
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


class GapWatch:
    """Looks at lambda_{k+1} now and then, and says so where the gap has closed.

    Args:
        every: calls from one look to the next, the first one included; 0 for none.

    Attributes:
        value: lambda_{k+1} when last looked at, from below; NaN before.
        looks: how many there were.

    Raises:
        InvalidInput: a negative `every`.
    """

    def __init__(self, every: int) -> None:
        if every < 0:
            raise invalid("gap_every", every, "an integer >= 0")
        self.every = every
        self.value = math.nan
        self.looks = 0
        self._calls = 0
        self._vector: Tensor | None = None
        self._closed = False

    def look(
        self, operator: Callable[[], SymmetricOperator], rows: Tensor, eigenvalues: Tensor
    ) -> float:
        """Find lambda_{k+1} if that is due; returns the vectors multiplied.

        Args:
            operator: builds the operator, if need be.
            rows: the basis of the subspace as rows (k, P).
            eigenvalues: (k,), descending.

        Warns:
            GapClosed: once, until the gap has opened again.
        """
        self._calls += 1
        if not self.every or (self._calls - 1) % self.every or rows.shape[0] == rows.shape[1]:
            return 0.0
        found = next_eigenpair(operator(), rows, float(eigenvalues[0]), self._vector)
        self.value, self._vector = found.value, found.vector
        self.looks += 1
        closed = self.value > CLOSED * float(eigenvalues[-1]) > 0
        if closed and not self._closed:
            self._warn(eigenvalues)
        self._closed = closed
        return found.num_matvecs

    def forget(self) -> None:
        """The subspace is another one now: look at the next call."""
        self.value, self._calls = math.nan, 0

    def ratio(self, eigenvalues: Tensor) -> float:
        """abs(lambda_{k+1}) / abs(lambda_k)."""
        last = abs(float(eigenvalues[-1]))
        return abs(self.value) / last if last else math.inf

    def _warn(self, eigenvalues: Tensor) -> None:
        k = len(eigenvalues)
        known = torch.cat([eigenvalues, eigenvalues.new_tensor([self.value])])
        # lambda_{k+1} can have overtaken lambda_k.
        wider = widest_gap(known.sort(descending=True).values)
        hint = f"; the gap is widest at k = {wider}" if wider != k else ""
        warnings.warn(
            f"lambda_{k} = {float(eigenvalues[-1]):.4g} and lambda_{k + 1} = {self.value:.4g} close"
            f" up: the dominant subspace of dimension {k} is ill defined{hint}",
            GapClosed,
            stacklevel=7,
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next look depends on."""
        return {
            "value": self.value,
            "looks": self.looks,
            "calls": self._calls,
            "vector": self._vector,
            "closed": self._closed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.value, self.looks, self._calls = state["value"], state["looks"], state["calls"]
        self._vector, self._closed = state["vector"], state["closed"]
