"""What sources that solve from scratch have in common: nothing is followed from step to step.

`NextEigenspace` and `BatchSubspace` say what is solved; here is when, and what is kept.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from thalweg.errors import InvalidInput
from thalweg.linalg import norm
from thalweg.loss.protocol import Loss
from thalweg.operators.hessian import PRODUCT_COST
from thalweg.sharding import packed, sharding_of, unpacked
from thalweg.spectrum.subspace import Subspace
from thalweg.tracking.source import Split, TrackerReport, check_every


class SolvedSource(ABC):
    """A subspace solved anew at every n-th update, and kept in between; a `SubspaceSource`.

    Args:
        objective: the loss over all samples.
        k: dimension of the subspace.
        tolerance: residual of the solves.
        every: n.

    Attributes:
        report: what the last update cost, and how far it can be trusted: a `TrackerReport`. Costs
            are in gradients of the full loss: a product over n of N samples counts n / N.

    Raises:
        InvalidInput: every < 1.
    """

    def __init__(self, objective: Loss, k: int, *, tolerance: float, every: int) -> None:
        check_every(every)
        self.objective = objective
        self.k = k
        self.tolerance = tolerance
        self.every = every
        self.report = TrackerReport(math.nan, 0.0, False, 0, 0)
        self._subspace: Subspace | None = None
        self._calls = 0

    @abstractmethod
    def _solve(self, theta: Tensor | None) -> tuple[Subspace, int]:
        """The subspace at theta, with the matvecs it took; and how many samples these were of."""

    @property
    def subspace(self) -> Subspace:
        """The subspace of the last update.

        Raises:
            InvalidInput: there was no update yet.
        """
        if self._subspace is None:
            raise InvalidInput("there is no subspace yet; call update() first")
        return self._subspace

    def update(self, theta: Tensor | None = None, vector: Tensor | None = None) -> Subspace:
        """Solve at theta (P,), None for the model's parameters, where that is due.

        Args:
            theta: the point.
            vector: (P,), whose projection the error in the report is about; None for the worst
                vector of the basis.

        Raises:
            Diverged: the loss or a product is NaN or infinite.
        """
        self._calls += 1
        if self._subspace is not None and (self._calls - 1) % self.every:
            self.report = TrackerReport(math.nan, 0.0, False, 0, self.report.age + 1)
            return self._subspace
        solved, samples = self._solve(theta)
        self._subspace = replace(solved, residuals=None, num_matvecs=0.0, converged=None)
        fraction = samples / self.objective.num_samples
        cost = PRODUCT_COST * solved.num_matvecs * fraction
        off = () if solved.eigenvalue_errors is None else solved.eigenvalue_errors.tolist()
        self.report = TrackerReport(
            self._error(vector), cost, True, samples, 0, eigenvalue_errors=tuple(off)
        )
        return self._subspace

    def _error(self, vector: Tensor | None) -> float:
        """That of P_k v, residuals over gaps; without a vector that of the worst basis vector."""
        if vector is not None:
            return self.subspace.error(vector)
        angles = self.subspace.angles
        return math.nan if angles is None else float(angles.max())

    def split(self, vector: Tensor) -> Split:
        """Split a vector (P,) at the theta of the last update."""
        dominant, bulk = self.subspace.split(vector)
        error, length = self.subspace.error(vector), float(norm(bulk))
        bulk_error = error * float(norm(vector)) / length if length > 0 else 0.0
        return Split(dominant, bulk, error=error, bulk_error=bulk_error)

    def state_dict(self) -> dict[str, Any]:
        """The basis as rows, its eigenvalues, and how many updates there were."""
        found = self._subspace
        state = {
            "rows": None if found is None else found.basis.T,
            "eigenvalues": None if found is None else found.eigenvalues,
            "angles": None if found is None else found.angles,
            "eigenvalue_errors": None if found is None else found.eigenvalue_errors,
            "calls": self._calls,
            "age": self.report.age,
        }
        return packed(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        state = unpacked(state, sharding_of(self.objective))
        self._calls = state["calls"]
        self.report = TrackerReport(math.nan, 0.0, False, 0, state["age"])
        self._subspace = (
            None
            if state["rows"] is None
            else Subspace(
                state["rows"].T,
                state["eigenvalues"],
                angles=state.get("angles"),
                eigenvalue_errors=state.get("eigenvalue_errors"),
            )
        )
