"""Subspaces that are not S_k: what a claim about S_k must fail on.

`random_subspace` gives k random directions (alignment near sqrt(k / P)); `NextEigenspace` the k
eigenvectors below the dominant ones.

Example:
    >>> import torch
    >>> inputs = torch.randn(64, 4) * torch.tensor([4.0, 3.0, 2.0, 1.0])
    >>> data = (inputs, torch.randn(64, 1))
    >>> objective = Objective(torch.nn.Linear(4, 1, bias=False), torch.nn.MSELoss(), data)
    >>> below = NextEigenspace(objective, k=1).update()
    >>> second = 2 * torch.linalg.eigvalsh(inputs.T @ inputs / 64)[-2]  # H = 2 X^T X / N
    >>> torch.allclose(below.eigenvalues[0], second, rtol=1e-3)
    True
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from thalweg.curvature.eigensolver import eigenpairs
from thalweg.curvature.objective import Objective
from thalweg.curvature.operators import PRODUCT_COST, Hessian
from thalweg.curvature.source import Split, TrackerReport
from thalweg.curvature.subspace import Subspace
from thalweg.errors import InvalidInput, invalid


class NextEigenspace:
    """The span of u_{k+1}, ..., u_{2k}, from scratch; a `SubspaceSource`.

    Args:
        objective: the loss.
        k: dimension, 1 <= k <= P / 2.
        tolerance: residual of the solves, see `eigenpairs`.
        every: solve at every n-th update only, and keep the basis in between.

    Raises:
        InvalidInput: k is out of that range; every < 1.
    """

    def __init__(
        self, objective: Objective, k: int, *, tolerance: float = 1e-3, every: int = 1
    ) -> None:
        if every < 1:
            raise invalid("every", every, "an integer >= 1")
        if k < 1:
            raise invalid("k", k, "an integer >= 1")
        if 2 * k > objective.num_parameters:
            raise invalid("k", k, f"at most P / 2 = {objective.num_parameters // 2} here")
        self.objective = objective
        self.k = k
        self.tolerance = tolerance
        self.every = every
        self.report = TrackerReport(float("nan"), 0.0, False, 0, 0)
        self._subspace: Subspace | None = None
        self._calls = 0

    @property
    def subspace(self) -> Subspace:
        """The subspace of the last update."""
        if self._subspace is None:
            raise InvalidInput("there is no subspace yet; call update() first")
        return self._subspace

    def update(self, theta: Tensor | None = None, vector: Tensor | None = None) -> Subspace:
        """The eigenpairs k + 1 to 2k at theta (P,), solved anew at every n-th update.

        The vector is not asked for.
        """
        self._calls += 1
        if self._subspace is not None and (self._calls - 1) % self.every:
            self.report = TrackerReport(float("nan"), 0.0, False, 0, self.report.age + 1)
            return self._subspace
        hessian = Hessian(self.objective, theta, keep_graph=True)
        band = (self.k, 2 * self.k)
        solved = eigenpairs(hessian, band=band, tolerance=self.tolerance, check_repeated=0)
        self._subspace = Subspace(solved.basis, solved.eigenvalues)
        cost = PRODUCT_COST * solved.products
        self.report = TrackerReport(self.tolerance, cost, True, self.objective.num_samples, 0)
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
        self.report = TrackerReport(float("nan"), 0.0, False, 0, state["age"])
        if state["rows"] is not None:
            self._subspace = Subspace(state["rows"].T, state["eigenvalues"])
