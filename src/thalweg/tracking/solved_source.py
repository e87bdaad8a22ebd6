"""What sources that solve from scratch have in common: nothing is followed from step to step.

`NextEigenspace` and `BatchSubspace` say what is solved; here is when, and what is kept.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from thalweg.errors import InvalidInput
from thalweg.loss.protocol import Loss
from thalweg.operators.hessian import PRODUCT_COST
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

        The vector is not asked for.

        Raises:
            Diverged: the loss or a product is NaN or infinite.
        """
        self._calls += 1
        if self._subspace is not None and (self._calls - 1) % self.every:
            self.report = TrackerReport(math.nan, 0.0, False, 0, self.report.age + 1)
            return self._subspace
        solved, samples = self._solve(theta)
        self._subspace = Subspace(solved.basis, solved.eigenvalues)
        fraction = samples / self.objective.num_samples
        cost = PRODUCT_COST * solved.num_matvecs * fraction
        self.report = TrackerReport(self.tolerance, cost, True, samples, 0)
        return self._subspace

    def split(self, vector: Tensor) -> Split:
        """Split a vector (P,) at the theta of the last update."""
        error = self.tolerance
        return Split(*self.subspace.split(vector), error=error, bulk_error=error)

    def state_dict(self) -> dict[str, Any]:
        """The basis as rows, its eigenvalues, and how many updates there were."""
        found = self._subspace
        return {
            "rows": None if found is None else found.basis.T,
            "eigenvalues": None if found is None else found.eigenvalues,
            "calls": self._calls,
            "age": self.report.age,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self._calls = state["calls"]
        self.report = TrackerReport(math.nan, 0.0, False, 0, state["age"])
        self._subspace = (
            None if state["rows"] is None else Subspace(state["rows"].T, state["eigenvalues"])
        )
