"""The top eigenspace of the Hessian, followed from one training step to the next.

A reference and a small sample. At a reference point theta_r keep an orthonormal basis U (P, b) and
Y_r = H(theta_r) U over all N samples. At a later step multiply the same U by the Hessian of a fixed
small subset B only, and correct the reference by the difference (a control variate):

    Y_t = Y_r + (H_B(theta_t) U - H_B(theta_r) U),    new basis = orth(Y_t V)

a warm power step, V the top eigenvectors of U^T Y_t. Half the difference that the first half of B
makes to the projection of a vector estimates the sampling error: see `reference.py`. What the
halves share (the bias of one power step) is measured against a fresh product over all samples at
each renewal: see `damping.py`. Subset size and renewal are chosen for a target error: see
`renewal.py`. Where the basis turns much from one step to the next, as at the edge of stability, a
second power step follows, and there may be two references: see `anchor.py`.

Cost is counted in gradients of the full loss, one product with all N samples as `PRODUCT_COST`.

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
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from thalweg.errors import InvalidInput, invalid
from thalweg.loss.guards.precision import full_precision
from thalweg.loss.protocol import Loss
from thalweg.operators.hessian import PRODUCT_COST, Hessian
from thalweg.operators.loss_operator import LossOperator
from thalweg.operators.symmetric import OperatorAt, SymmetricOperator
from thalweg.spectrum.eigensolver import top_eigenpairs
from thalweg.spectrum.gap import GapWatch
from thalweg.spectrum.subspace import Subspace
from thalweg.tracking.anchor import Anchors
from thalweg.tracking.damping import Damping
from thalweg.tracking.power_step import PowerStep, power_step
from thalweg.tracking.reference import Reference
from thalweg.tracking.refresh_policy import RenewalPolicy
from thalweg.tracking.source import Split, TrackerReport

# A second power step is taken where the first leaves more than this share of the target.
SECOND_STEP = 0.5


class SubspaceTracker:
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
        exact: solve for a converged basis at every update (dear: about 25 gradients).
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

    Memory: 4 to 6 times P k numbers beside the chunk, and 6 more while a solve goes on. A copy of a
    repeated eigenvalue can be missed by a solve in rare cases, see `eigenpairs`; looks at
    lambda_{k+1} find it later.

    Source: subspace iteration with Rayleigh-Ritz (Saad 2011, "Numerical Methods for Large
    Eigenvalue Problems", section 5.2), its products by a control variate as gradients are in SVRG
    (Johnson, Zhang 2013). Example: see the module.
    """

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
        if not 1 <= k <= objective.num_parameters:
            raise invalid("k", k, f"an integer from 1 to P = {objective.num_parameters}")
        if not error > 0 or (bulk_error is not None and not bulk_error > 0):
            raise invalid("error", error if bulk_error is None else bulk_error, "a number > 0")
        if every < 1:
            raise invalid("every", every, "an integer >= 1")
        self.objective = objective
        self.k = k
        self.operator = operator
        self.error = error
        self.bulk_error = bulk_error
        self.exact = exact or objective.num_samples < 8
        self.every = every
        self.tolerance = tolerance
        self._damping = Damping()
        self._gap = GapWatch(gap_every)
        self._report(math.nan, 0.0)
        self._generator = torch.Generator().manual_seed(seed)
        self._calls = 0
        self._theta: Tensor | None = None
        self._step: PowerStep | None = None
        self._anchors = Anchors(objective.num_samples, error)
        # Where the gradient of all samples was last asked for, and the operator with its graph.
        self._linearized: tuple[Tensor, SymmetricOperator] | None = None
        # Where the subset was used at the last theta: the operator over its first half, and the
        # reference that the last power step began from.
        self._half: SymmetricOperator | None = None
        self._seen_from: Reference | None = None

    @property
    def policy(self) -> RenewalPolicy:
        """How many samples are followed, and when the reference is renewed."""
        return self._anchors.policy

    @property
    def subspace(self) -> Subspace:
        """The subspace of the last update, basis (P, k) and eigenvalues (k,).

        Raises:
            InvalidInput: there was no update yet.
        """
        if self._step is None:
            raise InvalidInput("the tracker has no subspace yet; call update() first")
        return self._step.subspace()

    def gradient(self) -> Tensor:
        """The gradient of the loss over all samples at the model's parameters, (P,).

        That of `value_and_gradient`, for full-batch training with a `bulk_error` target: its graph,
        of all chunks, is kept until the next one is asked for or an update moves on to another
        theta, and `split` multiplies by it at the same parameters, which makes a refinement cheaper
        by a gradient. An operator that is no `LossOperator` shares no graph.

        Raises:
            Diverged: the loss or the gradient is NaN or infinite.
        """
        # Given up first: two graphs would take twice the memory.
        self._linearized = None
        theta = self.objective.theta()
        with full_precision():
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
            theta: the point (P,); None for the current parameters.
            vector: (P,), whose projection the target error is about; None for the gradient of the
                subset.

        Raises:
            Diverged: the loss or a product is NaN or infinite.
        """
        self._calls += 1
        if self._step is not None and (self._calls - 1) % self.every:
            age = self.report.age + 1
            self._report(math.nan, 0.0, age=age)
            return self.subspace
        self._theta = self.objective.theta() if theta is None else theta.detach()
        if self._linearized is not None and not torch.equal(self._linearized[0], self._theta):
            self._linearized = None
        with full_precision():
            if self._step is None or self.exact:
                self._report(self.tolerance, self._solve(), renewed=True)
            else:
                self._follow(vector)
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
        relative = _ratio(vector.norm(), (vector - dominant).norm())
        needed = self.bulk_error is not None and error * relative > self.bulk_error
        # The refinement divides by the eigenvalues.
        possible = not self.exact and float(step.eigenvalues[-1]) > 0
        if not (needed and possible):
            return Split(dominant, vector - dominant, error, error * relative)
        refined = step.refined_projection(self._curvature(None), vector)
        correction = float(_ratio((refined - dominant).norm(), vector.norm()))
        error = self._damping.value * correction
        bulk = vector - refined
        relative = _ratio(vector.norm(), bulk.norm())
        return Split(refined, bulk, error, error * relative, True, 2 * PRODUCT_COST)

    def estimate_error(self, vector: Tensor) -> float:
        """Estimated norm(tracked - P_k v) / norm(v) of the last update, for any vector (P,)."""
        sampling, bias = self._errors(vector)
        return (sampling**2 + bias**2) ** 0.5

    def _current(self) -> PowerStep:
        if self._step is None:
            raise InvalidInput("the tracker has no subspace yet; call update() first")
        return self._step

    def _curvature(self, samples: Tensor | None, *, keep_graph: bool = False) -> SymmetricOperator:
        """The operator at the theta of the last update."""
        assert self._theta is not None
        if samples is None and self._linearized is not None:
            theta, operator = self._linearized
            if torch.equal(theta, self._theta):
                return operator
        return self.operator(self.objective, self._theta, samples, keep_graph=keep_graph)

    def _solve(self) -> float:
        """Find the subspace from scratch; the cost in gradients."""
        self._anchors.forget()
        operator = self._curvature(None, keep_graph=True)
        solved = top_eigenpairs(operator, self.k, tolerance=self.tolerance)
        gradients = PRODUCT_COST * solved.num_matvecs
        self._step = PowerStep(solved.basis.T, solved.eigenvalues.double().cpu())
        return gradients + (self._look_at_gap() if self.exact else self._renew(solved=True))

    def _follow(self, vector: Tensor | None) -> None:
        assert self._theta is not None
        reference = self._anchors.serve(self._theta)
        self._half = self._curvature(reference.first_half, keep_graph=True)
        gradient = self._power_step(reference)
        if vector is None:
            known = gradient is not None
            vector = gradient if known else self.objective.value_and_gradient(self._theta)[1]
        passes = 1
        if self._bias(vector) > SECOND_STEP * self.error:
            # The basis has turned so far that one step leaves too much of it: another one.
            self._power_step(reference.turned(self._current().rows))
            passes = 2
        sampling, bias = self._errors(vector)
        self.policy.record(sampling, bias)
        error = (sampling**2 + bias**2) ** 0.5
        subset = self.policy.subset
        age = len(self.policy.history)
        # Two products with half the subset estimate the error.
        cost = PRODUCT_COST * (passes * self.k + 1) * subset / self.objective.num_samples
        if error <= self.error and not self.policy.due():
            self._report(error, cost, subset=subset, age=age)
            return
        checked, renewal = self._check(self._current(), vector, sampling, bias)
        share = self._damping.value
        left = min(checked * share / (1 - share), 1.0)
        self._report(left, cost + renewal, renewed=True, subset=subset, checked_error=checked)

    def _power_step(self, reference: Reference) -> Tensor | None:
        """Move the basis of a reference by a power step; the gradient of the subset, if known."""
        images, gradient = reference.images(self._curvature)
        self._step = power_step(reference.rows, images, self.k)
        self._seen_from = reference
        return gradient

    def _check(
        self, step: PowerStep, vector: Tensor, sampling: float, bias: float
    ) -> tuple[float, float]:
        """Renew the reference; learn from the fresh product how wrong the tracked basis was.

        Returns:
            That error, relative to norm(v), and the cost in gradients.
        """
        before = step.project(vector)
        cost = self._renew()
        checked = _ratio((self._current().project(vector) - before).norm(), vector.norm())
        self._damping.learn(checked, sampling, bias / self._damping.value)
        return checked, cost

    def _renew(self, *, solved: bool = False) -> float:
        """A product over all samples at the current theta: a new reference, and a power step.

        Args:
            solved: the basis has just been found from scratch.
        """
        assert self._theta is not None
        policy, rows = self._anchors.plan(), self._current().rows
        reference, images = self._reference(rows, policy.subset)
        self._anchors.renew(reference, self._theta, policy)
        self._step = power_step(rows, images, self.k)
        self._half, self._seen_from = None, reference
        # All samples, the subset and its first half.
        share = 1 + 1.5 * policy.subset / self.objective.num_samples
        cost = PRODUCT_COST * self.k * share + self._look_at_gap()
        if not solved and self._gap.value > float(self._step.eigenvalues[-1]) * (
            1 + self.tolerance
        ):
            # An eigenvector of the bulk has overtaken one of S_k: no power step brings it in.
            self._gap.forget()
            return cost + self._solve()
        return cost

    def _reference(self, rows: Tensor, size: int) -> tuple[Reference, Tensor]:
        """A reference at the current theta, and the products over all samples, as rows (k, P)."""
        num_samples = self.objective.num_samples
        return Reference.at(self._curvature, rows, size, num_samples, self._generator)

    def _look_at_gap(self) -> float:
        """Find lambda_{k+1} where that is due; the cost in gradients."""
        step, first = self._current(), self._gap.looks == 0
        products = self._gap.look(
            lambda: self._curvature(None, keep_graph=True), step.rows, step.eigenvalues
        )
        if first and self._gap.looks:
            self._damping.begin(self._gap.ratio(step.eigenvalues))
        return PRODUCT_COST * products

    def _report(
        self,
        error: float,
        gradients: float,
        *,
        renewed: bool = False,
        subset: int = 0,
        age: int = 0,
        checked_error: float | None = None,
    ) -> None:
        self.report = TrackerReport(
            error, gradients, renewed, subset, age, checked_error, self._gap.value
        )

    def _bias(self, vector: Tensor) -> float:
        """Estimated error that the power step left, relative to norm(v)."""
        return self._damping.value * _ratio(self._current().movement(vector), vector.norm())

    def _errors(self, vector: Tensor) -> tuple[float, float]:
        """Estimated sampling error and bias of the projection, relative to norm(v)."""
        if self.exact:
            return self.tolerance, 0.0
        step = self._current()
        # The same vector is often asked about twice in a step: by the control and by the split.
        if step.estimated is None or step.estimated[0] is not vector:
            sampling = 0.0
            if self._half is not None:
                assert self._seen_from is not None
                deviation = self._seen_from.deviation(self._half, step, vector)
                sampling = _ratio(deviation, vector.norm()) * self._subset_share
            step.estimated = (vector, sampling, self._bias(vector) / self._damping.value)
        _, sampling, moved = step.estimated
        return sampling, self._damping.value * moved

    @property
    def _subset_share(self) -> float:
        """The finite population correction: a subset of all samples has no sampling error."""
        return (1 - self.policy.subset / self.objective.num_samples) ** 0.5

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on bit for bit: bases as rows, so that their layout survives."""
        sampled = self._half is not None
        turned = (
            self._seen_from if sampled and self._seen_from is not self._anchors.reference else None
        )
        return {
            "calls": self._calls,
            "damping": self._damping.value,
            "gap": self._gap.state_dict(),
            "generator": self._generator.get_state(),
            "loss": self.objective.state_dict(),
            "report": vars(self.report).copy(),
            "theta": self._theta,
            "step": None if self._step is None else self._step.state_dict(),
            "anchors": self._anchors.state_dict(),
            "sampled": sampled,
            "turned": None if turned is None else turned.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave, the way to multiply by the Hessian included."""
        self._calls, self._damping.value = state["calls"], state["damping"]
        self._gap.load_state_dict(state["gap"])
        self._generator.set_state(state["generator"].cpu())
        # Until 0.1 what the loss keeps stood beside the tracker's own.
        self.objective.load_state_dict(state.get("loss", state))
        self.report = TrackerReport(**state["report"])
        self._theta = state["theta"]
        self._step = None if state["step"] is None else PowerStep(**state["step"])
        self._anchors.load_state_dict(state["anchors"])
        self._half = self._seen_from = self._linearized = None
        if state["sampled"]:
            turned = state["turned"]
            self._seen_from = self._anchors.reference if turned is None else Reference(**turned)
            self._half = self._curvature(self._seen_from.first_half, keep_graph=True)


def _ratio(part: Tensor, whole: Tensor) -> float:
    """part / whole, 0 where both vanish."""
    return float(part / whole) if whole > 0 else 0.0
