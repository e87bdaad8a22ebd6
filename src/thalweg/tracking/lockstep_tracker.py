"""The top eigenspaces of R runs, followed from one training step to the next in one computation.

What `tracker.py` does for one run, for many in lockstep. The subset and the renewals of the
references are common to all runs: its size is chosen for the typical run, and all references are
renewed when the worst run needs it. Everything that belongs to a run (its basis, what a power step
leaves of its error, its lambda_{k+1}) is its own. A step waits for the device once, when the error
estimates of all runs are read.

Not batched, and so run by run: the solves from scratch at the first step, and the looks at
lambda_{k+1}. Not here: two references at once (full-batch training at the edge of stability, where
a lockstep is right but renews often), operators other than the Hessian, the refinement of one
vector; `SubspaceTracker` has them.

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
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from thalweg.errors import InvalidInput, invalid
from thalweg.loss.guards.precision import full_precision
from thalweg.loss.lockstep_objective import LockstepObjective
from thalweg.operators.hessian import PRODUCT_COST, Hessian
from thalweg.spectrum.eigensolver import top_eigenpairs
from thalweg.spectrum.gap import GapWatch
from thalweg.spectrum.subspace import Subspace
from thalweg.tracking.damping import Damping
from thalweg.tracking.lockstep_power_step import (
    LockstepStep,
    lockstep_power_step,
    power_step_by_qr,
    refuse_divergence,
)
from thalweg.tracking.lockstep_reference import LockstepReference
from thalweg.tracking.refresh_policy import SMALLEST_SUBSET, RenewalPolicy
from thalweg.tracking.source import TrackerReport
from thalweg.tracking.tracker import SECOND_STEP

FEWEST_SAMPLES = 8


class LockstepTracker:
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

    Memory: about 10 R k P numbers beside the chunk. Source: that of `SubspaceTracker`. Example: see
    the module.
    """

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
        if not 1 <= k <= objective.num_parameters:
            raise invalid("k", k, f"an integer from 1 to P = {objective.num_parameters}")
        if not error > 0:
            raise invalid("error", error, "a number > 0")
        if objective.num_samples < FEWEST_SAMPLES:
            mend = "solve for each subspace with top_eigenpairs"
            raise invalid("data", f"{objective.num_samples} samples", "at least 8", mend)
        self.objective = objective
        self.k = k
        self.error = error
        self.tolerance = tolerance
        self.gap_every = gap_every
        self.policy = RenewalPolicy(objective.num_samples, error)
        self.reports: list[TrackerReport] = []
        self._generator = torch.Generator().manual_seed(seed)
        self._damping: list[Damping] = []
        self._gaps: list[GapWatch] = []
        self._step: LockstepStep | None = None
        self._reference: LockstepReference | None = None

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
        thetas = thetas.detach()
        with full_precision():
            if self._reference is None:
                self._begin(thetas)
            else:
                self._follow(self._reference, thetas, vectors)

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

    def _current(self) -> LockstepStep:
        if self._step is None:
            raise InvalidInput("the tracker has no subspace yet; call update() first")
        return self._step

    def _begin(self, thetas: Tensor) -> None:
        """Solve for every run's subspace from scratch, and take the first references."""
        runs = range(len(thetas))
        self._damping = [Damping() for _ in runs]
        self._gaps = [GapWatch(self.gap_every) for _ in runs]
        rows = thetas.new_empty(len(thetas), self.k, thetas.shape[1])
        costs = [self._solve(thetas, rows, runs), self._renew(thetas, rows)]
        costs.append(self._look_at_gaps(thetas))
        self._report([self.tolerance for _ in runs], _sums(costs), renewed=True)

    def _follow(self, reference: LockstepReference, thetas: Tensor, vectors: Tensor) -> None:
        sampling, moved = self._power_step(reference, thetas, vectors)
        passes = 1
        if max(self._biases(moved)) > SECOND_STEP * self.error:
            # A basis has turned so far that one step leaves too much of it: another one.
            turned = reference.turned(self._current().rows)
            sampling, moved = self._power_step(turned, thetas, vectors)
            passes = 2
        biases = self._biases(moved)
        errors = [math.hypot(s, b) for s, b in zip(sampling, biases, strict=True)]
        # With a size for the worst, nine runs counted 1.4 times the gradients of each by itself.
        typical = math.sqrt(sum(error**2 for error in sampling) / len(sampling))
        self.policy.record(typical, max(biases))
        subset = self.policy.subset
        cost = PRODUCT_COST * passes * self.k * subset / self.objective.num_samples
        costs = [cost for _ in errors]
        if max(errors) <= self.error and not self.policy.due():
            self._report(errors, costs, subset=subset)
            return
        before = self.project(vectors)
        costs = _sums([costs, self._renewal(thetas)])
        checked = self._learn(vectors, before, sampling, moved)
        left = [
            min(c * d.value / (1 - d.value), 1.0)
            for c, d in zip(checked, self._damping, strict=True)
        ]
        self._report(left, costs, renewed=True, subset=subset, checked=checked)

    def _power_step(
        self, reference: LockstepReference, thetas: Tensor, vectors: Tensor
    ) -> tuple[list[float], list[float]]:
        """Move all bases by a power step; sampling errors, and how far projections moved."""
        images, difference = reference.images(self.objective, thetas)
        step = lockstep_power_step(reference.rows, images, difference)
        found = torch.stack([*step.errors(vectors), step.sound.to(vectors)])
        # The one place where a step waits for the device.
        sampling, moved, sound = found.tolist()
        if not all(sound):
            step = power_step_by_qr(reference.rows, images, difference)
            sampling, moved = torch.stack(step.errors(vectors)).tolist()
        if not all(map(math.isfinite, (*sampling, *moved))):
            refuse_divergence(vectors, "a vector")
        self._step = step
        # A subset of all samples has no sampling error: the finite population correction.
        share = (1 - self.policy.subset / self.objective.num_samples) ** 0.5
        return [share * value for value in sampling], moved

    def _biases(self, moved: Iterable[float]) -> list[float]:
        """What the power step is estimated to have left, from how far it moved projections."""
        return [d.value * m for d, m in zip(self._damping, moved, strict=True)]

    def _learn(
        self, vectors: Tensor, before: Tensor, sampling: Sequence[float], moved: Sequence[float]
    ) -> list[float]:
        """From a fresh product: how wrong the tracked projections were, relative to the vectors."""
        lengths = vectors.norm(dim=1).clamp(min=torch.finfo(vectors.dtype).tiny)
        checked = ((self.project(vectors) - before).norm(dim=1) / lengths).tolist()
        for damping, *errors in zip(self._damping, checked, sampling, moved, strict=True):
            damping.learn(*errors)
        return checked

    def _renewal(self, thetas: Tensor) -> list[float]:
        """New references, and a new solve where S_k has lost an eigenvector; the cost by run."""
        costs = [self._renew(thetas, self._current().rows), self._look_at_gaps(thetas)]
        values = self.eigenvalues()[:, -1].tolist()
        overtaken = [
            run
            for run, (gap, value) in enumerate(zip(self._gaps, values, strict=True))
            if gap.value > value * (1 + self.tolerance)
        ]
        if overtaken:
            # An eigenvector of the bulk has overtaken one of S_k: no power step brings it in.
            rows = self._current().rows.clone()
            costs += [self._solve(thetas, rows, overtaken), self._renew(thetas, rows)]
        return _sums(costs)

    def _solve(self, thetas: Tensor, rows: Tensor, runs: Iterable[int]) -> list[float]:
        """Find the subspaces of some runs from scratch, into rows (R, k, P); the cost by run."""
        costs = [0.0 for _ in thetas]
        for run in runs:
            hessian = self._hessian(thetas[run])
            solved = top_eigenpairs(hessian, self.k, tolerance=self.tolerance)
            rows[run] = solved.basis.T
            self._gaps[run].forget()
            costs[run] = PRODUCT_COST * solved.num_matvecs
        return costs

    def _renew(self, thetas: Tensor, rows: Tensor) -> list[float]:
        """Products over all samples: new references, and a power step; the cost by run."""
        self.policy.plan()
        subset = self.policy.subset = one_of_few(self.policy.subset, self.objective.num_samples)
        self._reference, images = LockstepReference.at(
            self.objective, thetas, rows, subset, self._generator
        )
        self._step = lockstep_power_step(rows, images)
        if not bool(self._step.sound.all()):
            self._step = power_step_by_qr(rows, images)
        cost = PRODUCT_COST * self.k * (1 + subset / self.objective.num_samples)
        return [cost for _ in thetas]

    def _look_at_gaps(self, thetas: Tensor) -> list[float]:
        """Find lambda_{k+1} of each run where that is due; the cost by run."""
        values, rows = self._current().eigenpairs()
        costs = []
        for run, gap in enumerate(self._gaps):
            first = gap.looks == 0
            products = gap.look(lambda t=thetas[run]: self._hessian(t), rows[run], values[run])
            if first and gap.looks:
                self._damping[run].begin(gap.ratio(values[run]))
            costs.append(PRODUCT_COST * products)
        return costs

    def _hessian(self, theta: Tensor) -> Hessian:
        """That of one run, by itself."""
        return Hessian(self.objective.objective, theta, keep_graph=True)

    def _report(
        self,
        errors: Sequence[float],
        costs: Sequence[float],
        *,
        renewed: bool = False,
        subset: int = 0,
        checked: Sequence[float] | None = None,
    ) -> None:
        age = len(self.policy.history)
        known = [None for _ in errors] if checked is None else checked
        self.reports = [
            TrackerReport(error, cost, renewed, subset, age, check, gap.value)
            for error, cost, check, gap in zip(errors, costs, known, self._gaps, strict=True)
        ]

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on bit for bit, as tensors and plain values."""
        return {
            "policy": self.policy.state_dict(),
            "generator": self._generator.get_state(),
            "loss": self.objective.state_dict(),
            "damping": [damping.value for damping in self._damping],
            "gaps": [gap.state_dict() for gap in self._gaps],
            "reports": [vars(report).copy() for report in self.reports],
            "step": None if self._step is None else vars(self._step).copy(),
            "reference": None if self._reference is None else vars(self._reference).copy(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave, the way to multiply by the Hessian included."""
        self.policy.load_state_dict(state["policy"])
        self._generator.set_state(state["generator"].cpu())
        # Until 0.1 what the loss keeps stood beside the tracker's own.
        self.objective.load_state_dict(state.get("loss", state))
        self._damping = [Damping() for _ in state["damping"]]
        for damping, value in zip(self._damping, state["damping"], strict=True):
            damping.value = value
        self._gaps = [GapWatch(self.gap_every) for _ in state["gaps"]]
        for gap, saved in zip(self._gaps, state["gaps"], strict=True):
            gap.load_state_dict(saved)
        self.reports = [TrackerReport(**report) for report in state["reports"]]
        self._step = None if state["step"] is None else LockstepStep(**state["step"])
        saved = state["reference"]
        self._reference = None if saved is None else LockstepReference(**saved)


def one_of_few(subset: int, num_samples: int) -> int:
    """The next larger of few subset sizes, 32 times powers of 2^(1/4), and even.

    Where a computation is recorded once for each shape, few sizes are few recordings.
    """
    steps = math.ceil(4 * math.log2(max(subset, SMALLEST_SUBSET) / SMALLEST_SUBSET))
    size = 2 * math.ceil(SMALLEST_SUBSET * 2 ** (steps / 4) / 2)
    return max(subset, min(size, num_samples // 4 * 2)) if subset >= SMALLEST_SUBSET else subset


def _sums(costs: Iterable[Sequence[float]]) -> list[float]:
    """The costs of each run, of several lists by run."""
    return [sum(parts) for parts in zip(*costs, strict=True)]
