"""The top eigenspaces of R runs, followed from one training step to the next in one computation.

How a step goes is in `following.py`, for one run and for many. Everything that belongs to a run
(its basis, what a power step leaves of its error, its lambda_{k+1}) is its own; the subset and the
renewals are common. A step waits for the device once, when the error estimates of all runs are
read. Not batched, and so run by run: solves from scratch, and looks at lambda_{k+1}.

Why not one class for one run and for many? It would cost one run nothing: on one CPU thread a
single run in lockstep takes as long as with `SubspaceTracker`, renewals included (side by side: 1.0
times on a 64-100-100-10 network and 1,437 samples, a step between renewals 0.6 times; 1.0 to 1.1
times on 784-200-200-10 and 5,000 samples). But its numbers are others: products come from `vmap`,
subsets in halves, and power steps without eigenvectors, so that no saved run would continue where
it was to the last bit. Where a layer has no `vmap`, runs are evaluated one by one. And other
operators than the Hessian, the refinement of one vector, two references at once (at the edge of
stability a lockstep is right, but renews often) and solves at every step are there for one run
only.

Example:
    >>> import torch
    >>> from thalweg.loss.objective import Objective
    >>> data = (torch.randn(64, 3) * torch.tensor([3.0, 1.0, 1.0]), torch.randn(64, 2))
    >>> runs = LockstepObjective(Objective(torch.nn.Linear(3, 2), torch.nn.MSELoss(), data))
    >>> tracker = LockstepTracker(runs, k=2)
    >>> thetas = torch.randn(5, 8)
    >>> _, gradients = runs.values_and_gradients(thetas)
    >>> tracker.update(thetas, gradients)
    >>> tracker.project(gradients).shape, tracker.subspace(4).k, tracker.reports[4].renewed
    (torch.Size([5, 8]), 2, True)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from thalweg.errors import invalid
from thalweg.loss.lockstep_objective import LockstepObjective
from thalweg.operators.hessian import PRODUCT_COST, Hessian
from thalweg.operators.product_check import check_once
from thalweg.spectrum.eigensolver import top_eigenpairs
from thalweg.spectrum.subspace import Subspace
from thalweg.surroundings import shielded
from thalweg.tracking.error_estimate import ErrorEstimate, lockstep_errors, population_correction
from thalweg.tracking.following import FEWEST_SAMPLES, Following
from thalweg.tracking.power_step import (
    LockstepPowerStep,
    lockstep_power_step,
    lockstep_power_step_by_qr,
    refuse_divergence,
)
from thalweg.tracking.reference import LockstepReference
from thalweg.tracking.refresh_policy import RefreshPolicy


class LockstepTracker(Following[LockstepPowerStep, LockstepReference]):
    """Follows the top-k eigenspace S_k of the Hessian for each of R runs.

    Args:
        objective: the losses of the runs.
        k: dimension of the subspaces.
        error: target for norm(tracked - P_k v) / norm(v) of the worst run; a step whose estimate
            exceeds it renews all references at once.
        tolerance: residual of solves from scratch, see `top_eigenpairs`.
        gap_every: renewals from one look at lambda_{k+1} to the next, 0 for none.
        seed: of the subsets.

    Attributes:
        reports: for each run what the last update cost it, in gradients of its own full loss, and
            how far its subspace can be trusted: `TrackerReport`s; empty before the first update.

    Raises:
        InvalidInput: k < 1 or k > P, a target that is not positive, fewer than 8 samples.

    Warns:
        GapClosed: lambda_k and lambda_{k+1} of a run are nearly equal.
        NotConverged: a solve from scratch stopped early.

    Memory: about 10 R k P numbers beside the chunk. Source: see `following.py`. Example: see the
    module.
    """

    # The halves of the subset are multiplied apart anyway.
    estimate_matvecs = 0
    renewal_passes = 1

    def __init__(
        self,
        objective: LockstepObjective,
        k: int,
        *,
        error: float = 0.01,
        tolerance: float = 1e-3,
        gap_every: int = 10,
        seed: int = 0,
    ) -> None:
        super().__init__(
            objective.num_parameters,
            objective.num_samples,
            k,
            error=error,
            tolerance=tolerance,
            seed=seed,
        )
        if objective.num_samples < FEWEST_SAMPLES:
            hint = "solve for each subspace with top_eigenpairs"
            raise invalid("data", f"{objective.num_samples} samples", "at least 8", hint)
        check_once(Hessian(objective.objective))
        self.objective = objective
        self.gap_every = gap_every
        # Where a computation is recorded once for each shape, few sizes are few recordings.
        self._policy = RefreshPolicy(objective.num_samples, error, few_sizes=True)
        self._thetas: Tensor | None = None
        self._reference: LockstepReference | None = None
        # Sampling errors and movements of the last power step, read from the device at once.
        self._seen: tuple[list[float], list[float]] = [], []

    @property
    def policy(self) -> RefreshPolicy:
        """How many samples are followed, and when the references are renewed; of all runs."""
        return self._policy

    def update(self, thetas: Tensor, vectors: Tensor) -> None:
        """Move on to thetas.

        Args:
            thetas: the points (R, P); R is that of the first update.
            vectors: (R, P), whose projections the target error is about: gradients, or updates.

        Raises:
            InvalidInput: other shapes.
            Diverged: a product of some run is NaN or infinite; the message names the runs.
        """
        runs = len(thetas) if self._step is None else len(self._step.rows)
        expected = (runs, self.objective.num_parameters)
        if thetas.shape != expected or vectors.shape != expected:
            given = f"{tuple(thetas.shape)} and {tuple(vectors.shape)}"
            raise invalid("thetas and vectors", given, f"(R, P) = {expected} both")
        self._thetas = thetas.detach()
        with shielded():
            if self._reference is None:
                self._estimates = [ErrorEstimate(self.gap_every) for _ in range(runs)]
                self._begin(runs)
            else:
                self._follow(self._reference, vectors)

    def project(self, vectors: Tensor) -> Tensor:
        """P_k v of each run at the thetas of the last update, (R, P), for vectors (R, P).

        Raises:
            InvalidInput: there was no update yet.
        """
        return self._current().project(vectors)

    def eigenvalues(self) -> Tensor:
        """The Ritz values of all runs, (R, k), each run's descending."""
        return self._current().eigenvalues()

    def subspace(self, run: int) -> Subspace:
        """S_k of one run at the last update.

        Raises:
            InvalidInput: there was no update yet.
        """
        values, rows = self._current().eigenpairs()
        return Subspace(rows[run].T, values[run])

    def _operator(self, run: int) -> Hessian:
        assert self._thetas is not None
        return Hessian(self.objective.objective, self._thetas[run], keep_graph=True)

    def _solve(self, runs: Iterable[int]) -> list[float]:
        assert self._thetas is not None
        (count, size), costs = self._thetas.shape, [0.0 for _ in self._thetas]
        if self._step is None:
            rows = self._thetas.new_empty(count, self.k, size)
            ritz = self._thetas.new_zeros(count, self.k, self.k, dtype=torch.float64)
        else:
            rows, ritz = self._step.rows.clone(), self._step.ritz.clone()
        for run in runs:
            solved = top_eigenpairs(self._operator(run), self.k, tolerance=self.tolerance)
            rows[run], ritz[run] = solved.basis.T, torch.diag(solved.eigenvalues)
            costs[run] = PRODUCT_COST * solved.num_matvecs
        self._step = LockstepPowerStep(rows, ritz)
        return costs

    def _take_reference(self, rows: Tensor) -> None:
        assert self._thetas is not None
        self.policy.plan()
        self._reference, images = LockstepReference.at(
            self.objective, self._thetas, rows, self.policy.subset, self._generator
        )
        step = lockstep_power_step(rows, images)
        assert step.sound is not None
        self._step = step if bool(step.sound.all()) else lockstep_power_step_by_qr(rows, images)

    def _power_step(self, reference: LockstepReference, vector: Tensor | None) -> Tensor:
        assert self._thetas is not None
        assert vector is not None
        images, difference = reference.images(self.objective, self._thetas)
        step = lockstep_power_step(reference.rows, images, difference)
        assert step.sound is not None
        found = torch.stack([*lockstep_errors(step, vector), step.sound.to(vector)])
        # The one place where a step waits for the device.
        sampling, moved, sound = found.tolist()
        if not all(sound):
            step = lockstep_power_step_by_qr(reference.rows, images, difference)
            sampling, moved = torch.stack(lockstep_errors(step, vector)).tolist()
        if not all(map(math.isfinite, (*sampling, *moved))):
            refuse_divergence(vector, "a vector")
        correction = population_correction(self.policy.subset, self.num_samples)
        self._step, self._seen = step, ([correction * error for error in sampling], moved)
        return vector

    def _movements(self, vector: Tensor) -> list[float]:
        return self._seen[1]

    def _sampling_errors(self, vector: Tensor) -> list[float]:
        return self._seen[0]

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue bit for bit, as tensors and plain values."""
        return super().state_dict() | {
            "loss": self.objective.state_dict(),
            "policy": self.policy.state_dict(),
            "reference": None if self._reference is None else self._reference.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave, the way to multiply by the Hessian included."""
        self._estimates = [ErrorEstimate(self.gap_every) for _ in state["estimates"]]
        super().load_state_dict(state)
        self.objective.load_state_dict(state.get("loss", state))
        self.policy.load_state_dict(state["policy"])
        self._step = None if state["step"] is None else LockstepPowerStep(**state["step"])
        saved = state["reference"]
        self._reference = None if saved is None else LockstepReference(**saved)
