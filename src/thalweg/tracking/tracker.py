"""The top eigenspace of the Hessian of one run, followed from one training step to the next.

How a step goes is in `following.py`; here is what one run has and many in lockstep do not:

- **Bit for bit** the same numbers from one version to the next, on the CPU. `LockstepTracker` with
  one run does other arithmetic: see there for how long it takes.
- Any symmetric operator of the loss, and every model that differentiates twice.
- `split`, which refines one vector by two products where a target for the bulk asks for it.
- Two references where the iterate jumps to and fro: see `anchor.py`.
- `exact`, a solve at every update; `every`, an update at every n-th call.

Example:
    >>> import torch
    >>> from thalweg.loss.objective import Objective
    >>> data = (torch.randn(64, 3) * torch.tensor([3.0, 1.0, 1.0]), torch.randn(64, 2))
    >>> objective = Objective(torch.nn.Linear(3, 2), torch.nn.MSELoss(), data)
    >>> tracker = SubspaceTracker(objective, k=2)
    >>> tracker.update().k, tracker.report.renewed
    (2, True)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from thalweg.linalg import norm
from thalweg.loss.protocol import Loss
from thalweg.operators.hessian import PRODUCT_COST, Hessian
from thalweg.operators.loss_operator import LossOperator
from thalweg.operators.symmetric import OperatorAt, SymmetricOperator
from thalweg.spectrum.eigensolver import top_eigenpairs
from thalweg.spectrum.subspace import Subspace
from thalweg.surroundings import shielded
from thalweg.tracking.anchor import Anchors
from thalweg.tracking.error_estimate import (
    ErrorEstimate,
    SeenError,
    population_correction,
    relative,
    total,
)
from thalweg.tracking.following import FEWEST_SAMPLES, Following
from thalweg.tracking.power_step import PowerStep, power_step
from thalweg.tracking.reference import Reference
from thalweg.tracking.refresh_policy import RefreshPolicy
from thalweg.tracking.source import Split, TrackerReport, check_every, check_target


class SubspaceTracker(Following[PowerStep, Reference]):
    """Follows the top-k eigenspace S_k of the Hessian of a loss.

    Args:
        objective: the loss.
        k: dimension of the subspace.
        operator: whose eigenspace, at a theta and over some samples: `Hessian`, `GaussNewton`, or
            any function with their arguments that returns a symmetric operator.
        error: target for norm(tracked - P_k v) / norm(v); most steps stay below it, and a step
            whose estimate exceeds it renews the reference at once.
        bulk_error: target for the same error relative to norm((I - P_k) v). Where tracking alone
            does not meet it, `split` refines the one vector by two products over all samples.
        exact: solve for a converged basis at every update (expensive: about 25 gradients).
        every: recompute at every n-th update only, and keep the basis in between.
        tolerance: residual of solves from scratch, see `top_eigenpairs`.
        gap_every: renewals of the reference from one look at lambda_{k+1} to the next, 0 for none.
            Each costs at most 15 products.
        seed: of the subsets.

    Attributes:
        report: what the last update cost, and how far it can be trusted: a `TrackerReport`.

    Raises:
        InvalidInput: k < 1 or k > P, a target or period that is not positive.

    Warns:
        GapClosed: lambda_k and lambda_{k+1} are nearly equal, so that S_k is ill defined.
        NotConverged: a solve from scratch, at the first update for one, stopped early.

    Memory: 4 to 6 times P k numbers beside the chunk, and 6 more while a solve runs. A copy of a
    repeated eigenvalue can be missed by a solve in rare cases, see `eigenpairs`; looks at
    lambda_{k+1} find it later.

    Source: see `following.py`. Example: see the module.
    """

    # Of the subset: two products with half of it; itself and its first half.
    estimate_matvecs = 1
    renewal_passes = 1.5

    def __init__(
        self,
        objective: Loss,
        k: int,
        *,
        operator: OperatorAt = Hessian,
        error: float = 0.01,
        bulk_error: float | None = None,
        exact: bool = False,
        every: int = 1,
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
        if bulk_error is not None:
            check_target(bulk_error)
        check_every(every)
        self.objective = objective
        self.operator = operator
        self.bulk_error = bulk_error
        self.exact = exact or objective.num_samples < FEWEST_SAMPLES
        self.every = every
        self._estimates = [ErrorEstimate(gap_every)]
        self._report([math.nan], [0.0])
        self._calls = 0
        self._theta: Tensor | None = None
        self._anchors = Anchors(objective.num_samples, error)
        # Where the gradient of all samples was last asked for, and the operator with its graph.
        self._linearized: tuple[Tensor, SymmetricOperator] | None = None
        # Where the subset was used at the last theta: the operator over its first half, and the
        # reference that the last power step began from.
        self._half: SymmetricOperator | None = None
        self._seen_from: Reference | None = None
        self._last_seen: SeenError | None = None

    @property
    def report(self) -> TrackerReport:
        """What the last update cost, and how far it can be trusted."""
        return self.reports[0]

    @property
    def policy(self) -> RefreshPolicy:
        """How many samples are followed, and when the reference is renewed."""
        return self._anchors.policy

    @property
    def subspace(self) -> Subspace:
        """The subspace of the last update, basis (P, k) and eigenvalues (k,).

        Raises:
            InvalidInput: there was no update yet.
        """
        return self._current().subspace()

    def gradient(self) -> Tensor:
        """The gradient of the loss over all samples at the model's parameters, (P,).

        That of `Objective.gradient`, for full-batch training with a `bulk_error` target: its graph,
        of all chunks, is kept until the next one is asked for or an update moves on to another
        theta, and `split` multiplies by it at the same parameters, which makes a refinement cheaper
        by a gradient. An operator that is no `LossOperator` shares no graph.

        Raises:
            Diverged: the loss or the gradient is NaN or infinite.
        """
        # Given up first: two graphs would take twice the memory.
        self._linearized = None
        theta = self.objective.theta()
        with shielded():
            operator = self.operator(self.objective, theta, keep_graph=True)
            # Another one's may be in a metric of its own, as that of `Preconditioned` is.
            if not isinstance(operator, LossOperator):
                return self.objective.value_and_gradient(theta)[1]
            gradient = operator.gradient
        self._linearized = theta, operator
        return gradient

    def update(self, theta: Tensor | None = None, vector: Tensor | None = None) -> Subspace:
        """Move on to theta and return S_k there.

        Args:
            theta: the point (P,); None for the model's current parameters.
            vector: (P,), whose projection the target error is about; None for the gradient of the
                subset.

        Raises:
            Diverged: the loss or a product is NaN or infinite.
        """
        self._calls += 1
        if self._step is not None and (self._calls - 1) % self.every:
            self._report([math.nan], [0.0], age=self.report.age + 1)
            return self.subspace
        self._theta = self.objective.theta() if theta is None else theta.detach()
        self._last_seen = None
        if self._linearized is not None and not torch.equal(self._linearized[0], self._theta):
            self._linearized = None
        with shielded():
            if self.exact:
                cost = self._solve([0])[0] + self._look_at_gaps()[0][0]
                self._report([self.tolerance], [cost], renewed=True)
            elif self._step is None:
                self._begin(1)
            else:
                reference = self._anchors.serve(self._theta)
                self._half = self._curvature(reference.first_half, keep_graph=True)
                self._follow(reference, vector)
        return self.subspace

    def split(self, vector: Tensor) -> Split:
        """Split a vector (P,) at the theta of the last update, of any unit.

        With a `bulk_error` target, and where the estimate does not meet it, the projection is
        refined by two products: to second order, what a warm power step of the whole basis would
        give for this vector. The error left is that of the basis times about
        abs(lambda_{k+1}) / lambda_k.

        Raises:
            InvalidInput: there was no update yet.
            Diverged: a product is NaN or infinite.
        """
        step = self._current()
        dominant = step.project(vector)
        error = self.estimate_error(vector)
        bulk_error = error * _ratio(vector, vector - dominant)
        needed = self.bulk_error is not None and bulk_error > self.bulk_error
        # The refinement divides by the eigenvalues.
        possible = not self.exact and float(step.eigenvalues[-1]) > 0
        if not (needed and possible):
            return Split(dominant, vector - dominant, error, bulk_error)
        refined = step.refined_projection(self._curvature(None), vector)
        error = self._estimates[0].bias(relative(refined - dominant, vector)[0])
        bulk = vector - refined
        bulk_error = error * _ratio(vector, bulk)
        return Split(refined, bulk, error, bulk_error, True, 2 * PRODUCT_COST)

    def estimate_error(self, vector: Tensor) -> float:
        """Estimated norm(tracked - P_k v) / norm(v) of the last update, for any vector (P,).

        Raises:
            InvalidInput: there was no update yet.
        """
        self._current()
        if self.exact:
            return self.tolerance
        return total(*self._sampling_errors(vector), *self._biases(vector))

    def _curvature(self, samples: Tensor | None, *, keep_graph: bool = False) -> SymmetricOperator:
        """The operator at the theta of the last update."""
        assert self._theta is not None
        if samples is None and self._linearized is not None:
            theta, operator = self._linearized
            if torch.equal(theta, self._theta):
                return operator
        return self.operator(self.objective, self._theta, samples, keep_graph=keep_graph)

    def _operator(self, run: int) -> SymmetricOperator:
        return self._curvature(None, keep_graph=True)

    def _solve(self, runs: Iterable[int]) -> list[float]:
        # They belong to another subspace, and a solve takes memory.
        self._anchors.forget()
        solved = top_eigenpairs(self._operator(0), self.k, tolerance=self.tolerance)
        self._step = PowerStep(solved.basis.T, solved.eigenvalues.double().cpu())
        return [PRODUCT_COST * solved.num_matvecs]

    def _take_reference(self, rows: Tensor) -> None:
        assert self._theta is not None
        policy = self._anchors.plan()
        reference, images = self._reference(rows, policy.subset)
        self._anchors.renew(reference, self._theta, policy)
        self._step = power_step(rows, images, self.k)
        self._half, self._seen_from = None, reference

    def _reference(self, rows: Tensor, size: int) -> tuple[Reference, Tensor]:
        """A reference at the current theta, and the products over all samples, as rows (k, P)."""
        return Reference.at(self._curvature, rows, size, self.num_samples, self._generator)

    def _power_step(self, reference: Reference, vector: Tensor | None) -> Tensor:
        images, gradient = reference.images(self._curvature)
        self._step = power_step(reference.rows, images, self.k)
        self._seen_from = reference
        if vector is not None:
            return vector
        return self.objective.value_and_gradient(self._theta)[1] if gradient is None else gradient

    def _movements(self, vector: Tensor) -> list[float]:
        return [self._seen(vector).moved]

    def _sampling_errors(self, vector: Tensor) -> list[float]:
        return [self._seen(vector).sampling]

    def _seen(self, vector: Tensor) -> SeenError:
        step, seen = self._current(), self._last_seen
        # The same vector is often asked about more than once: by the tracker and by the split.
        if seen is None or seen.step is not step or seen.vector is not vector:
            correction = population_correction(self.policy.subset, self.num_samples)
            seen = SeenError(step, vector, self._seen_from, self._half, correction)
            self._last_seen = seen
        return seen

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue bit for bit: bases as rows, so that their layout stays."""
        sampled, seen_from = self._half is not None, self._seen_from
        turned = sampled and seen_from is not self._anchors.reference
        return super().state_dict() | {
            "calls": self._calls,
            "loss": self.objective.state_dict(),
            "theta": self._theta,
            "anchors": self._anchors.state_dict(),
            "sampled": sampled,
            "turned": seen_from.state_dict() if turned and seen_from else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave, the way to multiply by the Hessian included."""
        if "report" in state:
            # Until 0.1 the one run's report and estimate stood beside the rest.
            estimate = {"damping": state["damping"], "gap": state["gap"]}
            state = {**state, "reports": [state["report"]], "estimates": [estimate]}
        super().load_state_dict(state)
        self._calls = state["calls"]
        self.objective.load_state_dict(state.get("loss", state))
        self._theta = state["theta"]
        self._step = None if state["step"] is None else PowerStep(**state["step"])
        self._anchors.load_state_dict(state["anchors"])
        self._half = self._seen_from = self._linearized = self._last_seen = None
        if state["sampled"]:
            turned = state["turned"]
            self._seen_from = self._anchors.reference if turned is None else Reference(**turned)
            self._half = self._curvature(self._seen_from.first_half, keep_graph=True)


def _ratio(whole: Tensor, part: Tensor) -> float:
    """norm(whole) / norm(part), 0 where the part vanishes."""
    length = norm(part)
    return float(norm(whole) / length) if length > 0 else 0.0
