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
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from thalweg.errors import invalid
from thalweg.linalg import coordinates, equal, norm
from thalweg.loss.protocol import Loss
from thalweg.operators.hessian import PRODUCT_COST, Hessian
from thalweg.operators.loss_operator import LossOperator
from thalweg.operators.symmetric import OperatorAt, SymmetricOperator, product_with_error
from thalweg.sharding import packed, sharding_of, unpacked
from thalweg.spectrum.eigensolver import SolvedBlock
from thalweg.spectrum.subspace import Subspace
from thalweg.surroundings import shielded
from thalweg.tracking.anchor import Anchors
from thalweg.tracking.bulk_edge import BulkEdge
from thalweg.tracking.error_estimate import (
    Movement,
    bias,
    content,
    deviation_by_half,
    mixing,
    population_correction,
    relative,
    spread,
    total,
)
from thalweg.tracking.following import FEWEST_SAMPLES, Following, Seen
from thalweg.tracking.power_step import PowerStep, power_step
from thalweg.tracking.reference import Reference, draw_halves, relative_error
from thalweg.tracking.refresh_policy import RefreshPolicy
from thalweg.tracking.source import Split, TrackerReport, check_every, check_target

LEAP = 10.0
"""A step of theta so many times longer than usual is a jump: what is known is of another place."""
EARLIEST_LEAP = 5


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
        tolerance: residual of solves from scratch, see `top_eigenpairs`; it becomes finer where the
            target needs that, for a lambda_k far below lambda_1.
        gap_every: renewals of the reference from one thorough look for eigenvectors that the block
            may have missed to the next, 0 for none. Each costs at most 15 products.
        budget: gradients that one update may cost, but for a few: where the target would take more,
            it is missed, and the report says so. A solve that it ends, as the first one may be, has
            an error of 1, for an eigenvector may be missing, and the next update solves again. None
            for as many as it takes, at most those of a solve.
        seed: of the subsets.

    Attributes:
        report: what the last update cost, and how far it can be trusted: a `TrackerReport`.

    Raises:
        InvalidInput: k < 1 or k > P, a target or period that is not positive.

    Warns:
        GapClosed: lambda_k and lambda_{k+1} are nearly equal, so that S_k is ill defined.
        TargetMissed: the estimated error is larger than the target all the same.
        NotConverged: a solve from scratch, at the first update for one, stopped early.

    Memory: 5 to 7 times P b numbers beside the chunk, with b = k and up to 6 guard vectors where
    the gap is narrow, and 6 more while a solve runs. A copy of a repeated eigenvalue can be missed
    by a solve in rare cases, see `eigenpairs`; thorough looks find it later.

    Source: see `following.py`. Example: see the module.
    """

    follows_guards = True
    # Of the subset: two products with half of it; itself and its first half.
    sampling_matvecs = 1.0
    reference_matvecs = 1.5

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
        budget: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            objective.num_parameters,
            objective.num_samples,
            k,
            error=error,
            tolerance=tolerance,
            gap_every=gap_every,
            seed=seed,
        )
        if bulk_error is not None:
            check_target(bulk_error)
        if budget is not None and not budget > 0:
            raise invalid("budget", budget, "a number > 0, or None")
        check_every(every)
        self.objective = objective
        self.operator = operator
        self.bulk_error = bulk_error
        self.exact = exact or objective.num_samples < FEWEST_SAMPLES
        self.every = every
        self.budget = math.inf if budget is None else budget
        self._edges = [BulkEdge()]
        self.reports = [TrackerReport(math.nan, 0.0, False, 0, 0)]
        self._calls = 0
        self._theta: Tensor | None = None
        self._anchors = Anchors(objective.num_samples, error)
        # Where the gradient of all samples was last asked for, and the operator with its graph.
        self._linearized: tuple[Tensor, SymmetricOperator] | None = None
        # What multiplies the movement of the last power step, and the part of all samples it takes.
        self._half: SymmetricOperator | None = None
        self._half_part = 1.0
        # The plan of the next reference, and the samples of its subset.
        self._planned: tuple[RefreshPolicy, Tensor] | None = None
        # The last power step, the vector it was measured with, and what was seen.
        self._measured: tuple[PowerStep, Tensor | None, Seen] | None = None
        # The reference that the last power step began from, where that was by the subset; and how
        # much sampling changes an eigenvalue, relative to it.
        self._seen_from: Reference | None = None
        self._sigma = 0.0
        # Of the products of the last power step, see `relative_error`.
        self._product_error = 0.0
        # The gradient over all samples, where a product found it on its way.
        self._known_gradient: Tensor | None = None
        # How far theta goes in an update, on average over about ten, and updates so far.
        self._stride, self._strides = 0.0, 0
        self._leap = False

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
            self._keep()
            return self.subspace
        self._move(self.objective.theta() if theta is None else theta.detach())
        with shielded():
            self._advance(vector)
        return self.subspace

    def _move(self, theta: Tensor) -> None:
        """Move on to theta (P,), and notice a jump."""
        if self._linearized is not None and not equal(self._linearized[0], theta):
            self._linearized = None
        before, self._theta, self._known_gradient = self._theta, theta, None
        if before is None:
            return
        stride = float(norm(theta - before))
        self._leap = self._strides >= EARLIEST_LEAP and stride > LEAP * self._stride
        self._strides += 1
        self._stride += (stride - self._stride) / min(self._strides, 10)

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
        left = self._left_of(relative(refined - dominant, vector)[0])
        if self._product_error:
            left = math.hypot(left, self._product_error / _ratio(vector, refined))
        error = min(error, left)
        bulk = vector - refined
        bulk_error = error * _ratio(vector, bulk)
        return Split(refined, bulk, error, bulk_error, True, 2 * PRODUCT_COST)

    def _left_of(self, correction: float) -> float:
        """The error that is left of a projection, once two products have corrected it so far."""
        gap, ratio = self._gap(0), self._edges[0].ratio(self._last(0))
        if self._guards:
            # Guard vectors are part of the error here.
            ratio = gap.below / gap.last
        return bias(ratio if self._guards else self._contents[0], correction, ratio)

    def estimate_error(self, vector: Tensor) -> float:
        """Estimated norm(tracked - P_k v) / norm(v) of the last update, for any vector (P,).

        Raises:
            InvalidInput: there was no update yet.
        """
        step = self._current()
        if self._bare is not None:
            return total(self._bare[0], 0.0)
        known = self._measured
        if known is not None and known[0] is step and known[1] is vector:
            return total(*self._both(0, known[2]))
        # The content is that of the vector which the step was measured with.
        moved, _ = self._moved(vector)
        seen = Seen(self._sampling(vector), moved, *self._contents)
        whole = known[2].moved if known is not None and known[0] is step else 0.0
        # What a step moves less of, the renewal before it left less of.
        return total(*self._both(0, seen, min(moved / whole, 1.0) if whole > 0 else 1.0))

    def _curvature(self, samples: Tensor | None, *, keep_graph: bool = False) -> SymmetricOperator:
        """The operator at the theta of the last update."""
        assert self._theta is not None
        if samples is None and self._linearized is not None:
            theta, operator = self._linearized
            if equal(theta, self._theta):
                return operator
        return self.operator(self.objective, self._theta, samples, keep_graph=keep_graph)

    def _operator(self, run: int) -> SymmetricOperator:
        return self._curvature(None, keep_graph=True)

    def _solved_with(self, operator: SymmetricOperator, solved: SolvedBlock) -> None:
        self._product_error = solved.product_error
        # One more product shows what the power step from the solve leaves.
        self._half, self._half_part = operator, 1.0

    def _multiply(self, rows: Tensor) -> Tensor:
        operator = self._curvature(None)
        images, errors = product_with_error(operator, rows.T)
        self._product_error = relative_error(errors, images, self.k)
        images = images.T
        self._known_gradient = getattr(operator, "gradient", None)
        return images

    def _gradient(self) -> Tensor:
        if self._known_gradient is not None:
            return self._known_gradient
        return self.objective.value_and_gradient(self._theta)[1]

    def _step_from(self, rows: Tensor, images: Tensor) -> PowerStep:
        self._seen_from = None
        return power_step(rows, images, self.k)

    def _step_without(self, rows: Tensor, values: Tensor) -> PowerStep:
        self._seen_from = None
        return PowerStep(rows, values, self.k)

    def _joined(self, parts: list[Tensor]) -> Tensor:
        return parts[0]

    def _serve(self) -> Reference | None:
        assert self._theta is not None
        return self._anchors.serve(self._theta)

    def _follow_from(self, reference: Reference, vector: Tensor | None) -> Tensor:
        images, gradient, self._product_error = reference.images(self._curvature)
        self._step = power_step(reference.rows, images, self.k)
        self._half = self._curvature(reference.first_half, keep_graph=True)
        self._half_part = len(reference.first_half) / self.num_samples
        self._seen_from = reference
        if vector is not None:
            return vector
        return self.objective.value_and_gradient(self._theta)[1] if gradient is None else gradient

    def _draw_subset(self) -> None:
        policy = self._anchors.plan()
        halves = draw_halves(self.num_samples, policy.subset, self._generator)
        self._planned = policy, halves
        self._half = self._curvature(halves[0], keep_graph=True)
        self._half_part = len(halves[0]) / self.num_samples

    def _take_reference(self, rows: Tensor, images: Tensor) -> None:
        assert self._planned is not None
        assert self._theta is not None
        policy, halves = self._planned
        b = len(self._current().block)
        error = self._product_error
        reference = Reference.at(self._curvature, rows[:b].contiguous(), images[:b], halves, error)
        self._anchors.renew(reference, self._theta, policy)

    def _drop_references(self) -> None:
        self._anchors.forget()

    @property
    def _serving_reference(self) -> Reference | None:
        return self._anchors.reference

    def _leaped(self) -> bool:
        return self._leap

    @property
    def _content_part(self) -> float:
        return self._half_part

    def _seen(self, vector: Tensor, *, measured: bool) -> list[Seen]:
        moved, movement = self._moved(vector)
        step = self._current()
        if measured:
            assert self._half is not None
            fraction = float(content(step, movement, self._half @ movement.weighted))
        else:
            (fraction,) = self._contents
        seen = Seen(self._sampling(vector), moved, fraction)
        self._measured = step, vector, seen
        return [seen]

    def _moved(self, vector: Tensor) -> tuple[float, Movement]:
        movement = Movement.of(self._current(), vector)
        length = float(norm(vector))
        return float(movement.size) / length if length > 0 else 0.0, movement

    def _sampling(self, vector: Tensor) -> float:
        """Estimated sampling error of P_k v, relative to norm(v), and that of rounding."""
        step, length, error, sigma = self._current(), float(norm(vector)), 0.0, 0.0
        if length == 0:
            return 0.0
        if self._seen_from is not None:
            assert self._half is not None
            deviation = deviation_by_half(self._seen_from, self._half, step, vector)
            correction = population_correction(self.policy.subset, self.num_samples)
            sigma = correction * spread(step, deviation, vector)
            error = correction * float(deviation.outside)
            self._sigma = sigma if math.isfinite(sigma) else self._sigma
        if self._guards:
            error = math.hypot(error, mixing(step, self._sigma if sigma else 0.0, vector))
        if self._product_error:
            # Each Ritz vector is off by the error of its product over its eigenvalue.
            dominant = float(norm(coordinates(step.rows, vector)))
            error = math.hypot(error, self._product_error * dominant)
        return error / length

    def _eigenvalue_errors(self) -> list[tuple[float, ...]]:
        sizes = self._current().eigenvalues.abs()
        if self._seen_from is None:
            (known,) = self._value_errors
        else:
            # The diagonal of a sum of squares varies sqrt(2) times as much as what is beside it.
            known = tuple((math.sqrt(2) * self._sigma * sizes).tolist())
        off = (self._product_error * sizes).tolist()
        return [tuple(map(sum, zip(known, off, strict=True)))] if self._product_error else [known]

    def _spectrum(self, run: int) -> Tensor:
        return self._current().values

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue bit for bit: bases as rows, so that their layout stays."""
        seen = None
        if self._measured is not None and self._measured[0] is self._step:
            seen = vars(self._measured[2]).copy()
        seen_from = self._seen_from
        serves = seen_from is not None and seen_from is self._serving_reference
        state = super().state_dict() | {
            "calls": self._calls,
            "loss": self.objective.state_dict(),
            "theta": self._theta,
            "anchors": self._anchors.state_dict(),
            "seen": seen,
            "sigma": self._sigma,
            "product_error": self._product_error,
            "served": serves,
            "turned": None if serves or seen_from is None else seen_from.state_dict(),
            "stride": self._stride,
            "strides": self._strides,
        }
        return packed(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave, the way to multiply by the Hessian included.

        What version 0.1 saved has no place for guard vectors: the next update solves anew.

        Raises:
            InvalidInput: the parameters are in shards, and it is that of another rank, or of
                another number of them.
        """
        state = unpacked(state, sharding_of(self.objective))
        self._calls, self._theta = state["calls"], state["theta"]
        self.objective.load_state_dict(state.get("loss", state))
        self._half = self._linearized = self._measured = self._planned = self._seen_from = None
        self._known_gradient = self._fresh = self._step = None
        self._anchors = Anchors(self.num_samples, self.error)
        if "edges" not in state:
            reports = [state["report"]] if "report" in state else state["reports"]
            self.reports = [TrackerReport.from_state(report) for report in reports]
            self._generator.set_state(state["generator"].cpu())
            return
        super().load_state_dict(state)
        self._stride, self._strides = state["stride"], state["strides"]
        self._step = None if state["step"] is None else PowerStep(**state["step"])
        self._anchors.load_state_dict(state["anchors"])
        if state["seen"] is not None:
            assert self._step is not None
            self._measured = self._step, None, Seen(**state["seen"])
        self._sigma, self._product_error = state["sigma"], state.get("product_error", 0.0)
        turned = state["turned"]
        if state["served"] or turned is not None:
            self._seen_from = self._serving_reference if turned is None else Reference(**turned)
            assert self._seen_from is not None
            self._half = self._curvature(self._seen_from.first_half, keep_graph=True)


def _ratio(whole: Tensor, part: Tensor) -> float:
    """norm(whole) / norm(part), 0 where the part vanishes."""
    length = norm(part)
    return float(norm(whole) / length) if length > 0 else 0.0
