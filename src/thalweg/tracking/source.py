"""Where a subspace comes from at each step: the protocol that optimizers and probes ask.

`SubspaceTracker` follows S_k; `FixedSubspace` stays where it is; `NextEigenspace` is a baseline.

Example:
    >>> import torch
    >>> source = FixedSubspace(Subspace(torch.eye(3)[:, :1], torch.tensor([2.0])))
    >>> source.update(theta=torch.zeros(3)).eigenvalues.tolist(), source.report.subspace_cost
    ([2.0], 0.0)
    >>> parts = source.split(torch.tensor([3.0, 4.0, 0.0]))
    >>> parts.dominant.tolist(), parts.bulk.tolist(), parts.error
    ([3.0, 0.0, 0.0], [0.0, 4.0, 0.0], 0.0)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from thalweg.errors import invalid
from thalweg.sharding import packed, sharding_of, unpacked
from thalweg.spectrum.subspace import Subspace


class TargetMissed(UserWarning):
    """A tracked subspace is less exact than asked for, whatever was tried; once until it is met.

    The report of every step says so as well: `TrackerReport.target_met`.

    Example:
        >>> import warnings
        >>> warnings.simplefilter("error", TargetMissed)  # stop, where that will not do
    """


@dataclass(frozen=True)
class TrackerReport:
    """What the last step of a tracker cost, and how far its result can be trusted.

    Attributes:
        error: estimated norm(P_k v - tracked) / norm(v) for the vector the step was given.
        subspace_cost: what the step cost, counted in gradients of the full loss.
        renewed: whether a product over all samples was taken.
        subset: samples used at this step besides.
        age: steps since the reference.
        checked_error: at a renewal, how far a fresh power step over all samples moved the projected
            vector, relative to it; None at other steps. Compare with `error` there.
        next_eigenvalue: lambda_{k+1}, from below; NaN where not known.
        ill_defined: whether lambda_k and lambda_{k+1} are so close that the subspace between them
            is ill defined: what is measured of it is a matter of chance.
        target_met: whether `error` is within the tracker's target; where there is an error.
        eigenvalue_errors: estimated, of lambda_1 to lambda_k, in their unit; () where not known.
        caveat: why the subspace is not to be trusted, in words; "" where it is.

    Example:
        >>> report = TrackerReport(0.004, subspace_cost=0.3, renewed=False, subset=64, age=7)
        >>> report.error, report.next_eigenvalue
        (0.004, nan)
    """

    error: float
    subspace_cost: float
    renewed: bool
    subset: int
    age: int
    checked_error: float | None = None
    next_eigenvalue: float = math.nan
    ill_defined: bool = False
    target_met: bool = True
    eigenvalue_errors: tuple[float, ...] = ()
    caveat: str = ""

    @property
    def gradients(self) -> float:
        """Former name of `subspace_cost`."""
        return _former_cost(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> TrackerReport:
        """The report that was saved as `vars(report)`, by version 0.1 too."""
        state = dict(state)
        if "gradients" in state:
            state["subspace_cost"] = state.pop("gradients")
        # As a file keeps it: a list.
        state["eigenvalue_errors"] = tuple(state.get("eigenvalue_errors", ()))
        return cls(**state)


@dataclass(frozen=True)
class Split:
    """A vector in its dominant and its bulk part, with the estimated error of either.

    Attributes:
        dominant: P_k v, (P,).
        bulk: v - P_k v, (P,).
        error: estimated error of both parts, relative to norm(v).
        bulk_error: the same error relative to the norm of the bulk part.
        refined: whether two products were spent on this vector.
        subspace_cost: of the refinement, in gradients of the full loss.

    Both parts have the vector's dtype, device and unit; errors are pure numbers. Example: see the
    module.
    """

    dominant: Tensor
    bulk: Tensor
    error: float
    bulk_error: float
    refined: bool = False
    subspace_cost: float = 0.0

    @property
    def gradients(self) -> float:
        """Former name of `subspace_cost`."""
        return _former_cost(self)


def _former_cost(costing: TrackerReport | Split) -> float:
    name = type(costing).__name__
    hint = f"{name}.gradients is called {name}.subspace_cost now"
    warnings.warn(hint, DeprecationWarning, stacklevel=3)
    return costing.subspace_cost


class SubspaceSource(Protocol):
    """What gives an optimizer or a probe the subspace at each step: any class with these members.

    Example:
        >>> import torch
        >>> def sharpness(source: SubspaceSource, theta: torch.Tensor) -> float:
        ...     return float(source.update(theta).eigenvalues[0])
        >>> space = Subspace(torch.eye(3)[:, :1], torch.tensor([2.0]))
        >>> sharpness(FixedSubspace(space), torch.zeros(3))
        2.0
    """

    @property
    def report(self) -> TrackerReport:
        """What the last update cost, and how far it can be trusted."""
        ...

    @property
    def subspace(self) -> Subspace:
        """The subspace of the last update."""
        ...

    def update(self, theta: Tensor | None = None, vector: Tensor | None = None) -> Subspace:
        """Move on to a point and return the subspace there.

        Args:
            theta: the point (P,); None for the model's current parameters.
            vector: (P,), whose projection the error is about, such as the gradient.
        """
        ...

    def split(self, vector: Tensor) -> Split:
        """Split a vector (P,) at the theta of the last update."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue bit for bit."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        ...


def check_dimension(k: int, num_parameters: int) -> None:
    """Refuse a k that is no dimension of a subspace of parameter space.

    Raises:
        InvalidInput: k < 1 or k > P.
    """
    if not 1 <= k <= num_parameters:
        raise invalid("k", k, f"an integer from 1 to P = {num_parameters}")


def check_target(error: float) -> None:
    """Refuse a target error that is none.

    Raises:
        InvalidInput: not > 0.
    """
    if not error > 0:
        raise invalid("error", error, "a number > 0")


def check_every(every: int) -> None:
    """Refuse a period in updates that is none.

    Raises:
        InvalidInput: every < 1.
    """
    if every < 1:
        raise invalid("every", every, "an integer >= 1")


class FixedSubspace:
    """A subspace that stays: frozen at a branch point, or a baseline such as a random one.

    Args:
        subspace: of theta's length P, dtype and device.

    Attributes:
        report: of no error and no cost.

    A vector of another length than P is an `InvalidInput`. Example: see the module.
    """

    def __init__(self, subspace: Subspace) -> None:
        self._subspace = subspace
        self.report = TrackerReport(0.0, 0.0, False, 0, 0)

    @property
    def subspace(self) -> Subspace:
        """The subspace."""
        return self._subspace

    def update(self, theta: Tensor | None = None, vector: Tensor | None = None) -> Subspace:
        """The same subspace at every theta."""
        return self.subspace

    def split(self, vector: Tensor) -> Split:
        """Split a vector (P,); the error is rounding alone."""
        return Split(*self.subspace.split(vector), error=0.0, bulk_error=0.0)

    def state_dict(self) -> dict[str, Any]:
        """The basis (as rows, so that its layout survives) and its eigenvalues."""
        return packed({"rows": self.subspace.basis.T, "eigenvalues": self.subspace.eigenvalues})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        state = unpacked(state, sharding_of(self.subspace.basis))
        self._subspace = Subspace(state["rows"].T, state["eigenvalues"])
