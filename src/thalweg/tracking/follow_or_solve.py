"""S_k at points that may lie far apart: followed while that is cheaper than solving from scratch.

Between points many steps apart the subspace may turn so far that the tracker renews its reference
at each of them. That costs what a solve costs and is less exact. Measured on a
64-100-100-10 network on 1,797 digits, in gradients of the full loss and the median error of the
gradient's dominant part: with squared error and SGD, 200 steps apart, following takes 8 at 0.2 %
and solving 21 at 0.01 %; with cross-entropy and Adam, where the eigenvalues close up behind the
10th, 50 steps apart, 20 at 0.4 % against 19 at 0.06 %, and 200 apart 20 at 1.5 % against 21 at
0.08 %.

Example:
    >>> import torch
    >>> from thalweg.loss.objective import Objective
    >>> data = (torch.randn(64, 3) * torch.tensor([3.0, 1.0, 1.0]), torch.randn(64, 2))
    >>> source = FollowOrSolve(Objective(torch.nn.Linear(3, 2), torch.nn.MSELoss(), data), k=2)
    >>> source.update().k, source.solving
    (2, False)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from thalweg.loss.protocol import Loss
from thalweg.spectrum.subspace import Subspace
from thalweg.tracking.source import Split
from thalweg.tracking.tracker import SubspaceTracker

# Renewals in a row after which following has not paid. Where it does, about every second report
# renews when they lie 200 steps apart.
PATIENCE = 8
# Solves after which following is tried again: training may have calmed down.
SOLVES = 50


class FollowOrSolve:
    """A `SubspaceTracker` that is replaced by solves from scratch while it renews at every update.

    Decides by counts of renewals alone, so that two runs with one seed decide alike.

    Args:
        objective, k, error, seed: as for `SubspaceTracker`.

    Attributes:
        report: what the last update cost, and how far it can be trusted.

    Raises:
        InvalidInput: see `SubspaceTracker`.
    """

    def __init__(self, objective: Loss, k: int, *, error: float = 0.01, seed: int = 0) -> None:
        self.objective = objective
        self.k = k
        self.error = error
        self.seed = seed
        # The first update solves in any case.
        self._left = PATIENCE + 1
        self._tracker = self._new_tracker(exact=False)
        self.report = self._tracker.report

    @property
    def solving(self) -> bool:
        """Whether updates solve from scratch at present."""
        return self._tracker.exact

    @property
    def subspace(self) -> Subspace:
        """The subspace of the last update."""
        return self._tracker.subspace

    def update(self, theta: Tensor | None = None, vector: Tensor | None = None) -> Subspace:
        """Move on to theta (P,) and return S_k there; see `SubspaceTracker.update`."""
        if self._left == 0:
            self._tracker = self._new_tracker(exact=not self.solving)
            self._left = SOLVES if self.solving else PATIENCE + 1
        subspace = self._tracker.update(theta, vector)
        self.report = self._tracker.report
        self._left = self._left - 1 if self.solving or self.report.renewed else PATIENCE
        return subspace

    def split(self, vector: Tensor) -> Split:
        """Split a vector (P,) at the theta of the last update."""
        return self._tracker.split(vector)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue bit for bit."""
        return {"left": self._left, "solving": self.solving, "tracker": self._tracker.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self._left = state["left"]
        self._tracker = self._new_tracker(exact=state["solving"])
        self._tracker.load_state_dict(state["tracker"])
        self.report = self._tracker.report

    def _new_tracker(self, *, exact: bool) -> SubspaceTracker:
        return SubspaceTracker(
            self.objective, self.k, error=self.error, exact=exact, seed=self.seed
        )
