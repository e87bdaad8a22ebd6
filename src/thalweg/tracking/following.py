"""How eigenspaces are followed from one training step to the next: the algorithm, for R >= 1 runs.

A reference and a small sample. At a reference point theta_r keep an orthonormal basis U (P, b) and
Y_r = H(theta_r) U over all N samples. At a later step multiply the same U by the Hessian of a fixed
small subset B only, and correct the reference by the difference (a control variate):

    Y_t = Y_r + (H_B(theta_t) U - H_B(theta_r) U),    new basis = orth(Y_t V)

a warm power step, V the top eigenvectors of U^T Y_t. Each part of it is one file:

- `reference.py`: the products, corrected.
- `power_step.py`: the new basis.
- `error_estimate.py`: how wrong the new basis is.
- `refresh_policy.py`: how many samples B has, whether a second power step follows at once, as at
  the edge of stability, where the basis turns much from one step to the next, and when a fresh
  product over all samples renews the reference.

Here is their order, and what a step costs, in gradients of the full loss: one product with all N
samples counts as `PRODUCT_COST`. `SubspaceTracker` and `LockstepTracker` do the arithmetic.

Source: subspace iteration with Rayleigh-Ritz (Saad 2011, "Numerical Methods for Large Eigenvalue
Problems", section 5.2), its products by a control variate as gradients are in SVRG (Johnson, Zhang
2013).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from thalweg.errors import InvalidInput
from thalweg.operators.hessian import PRODUCT_COST
from thalweg.operators.symmetric import SymmetricOperator
from thalweg.tracking.error_estimate import ErrorEstimate, relative, total
from thalweg.tracking.power_step import LockstepPowerStep, PowerStep
from thalweg.tracking.reference import LockstepReference, Reference
from thalweg.tracking.refresh_policy import RefreshPolicy
from thalweg.tracking.source import TrackerReport, check_dimension, check_target

FEWEST_SAMPLES = 8
"""Of fewer samples no subset is followed."""

AnyStep = TypeVar("AnyStep", PowerStep, LockstepPowerStep)
AnyReference = TypeVar("AnyReference", Reference, LockstepReference)


class Following(ABC, Generic[AnyStep, AnyReference]):
    """Base of trackers: follows the top-k eigenspace of each of R runs, R = 1 included.

    Lists have a number for each run. Subset and renewals are common to all runs: the size is chosen
    for the typical run, and a renewal comes when the worst run needs it.

    Args:
        num_parameters: P.
        num_samples: N.
        k: dimension of the subspaces.
        error: target for norm(tracked - P_k v) / norm(v).
        tolerance: residual of solves from scratch, see `top_eigenpairs`.
        seed: of the subsets.

    Attributes:
        reports: what the last update cost each run, and how far its subspace can be trusted.

    Raises:
        InvalidInput: k < 1 or k > P, a target that is not positive.
    """

    estimate_matvecs: float
    """Products with the whole subset, of one vector, that an error estimate takes."""
    renewal_passes: float
    """Products with the whole subset that a renewal takes for each vector of a basis."""

    def __init__(
        self,
        num_parameters: int,
        num_samples: int,
        k: int,
        *,
        error: float,
        tolerance: float,
        seed: int,
    ) -> None:
        check_dimension(k, num_parameters)
        check_target(error)
        self.num_samples = num_samples
        self.k = k
        self.error = error
        self.tolerance = tolerance
        self.reports: list[TrackerReport] = []
        self._generator = torch.Generator().manual_seed(seed)
        self._estimates: list[ErrorEstimate] = []
        self._step: AnyStep | None = None

    # What one run and many in one computation do each in their own way:

    @property
    @abstractmethod
    def policy(self) -> RefreshPolicy:
        """How many samples are followed, and when the references are renewed."""

    @abstractmethod
    def _operator(self, run: int) -> SymmetricOperator:
        """The operator over all samples at a run's theta, for many products."""

    @abstractmethod
    def _solve(self, runs: Iterable[int]) -> list[float]:
        """Find the bases of some runs from scratch; the cost by run."""

    @abstractmethod
    def _take_reference(self, rows: Tensor) -> None:
        """Multiply bases by all samples: a new reference as planned, and a power step."""

    @abstractmethod
    def _power_step(self, reference: AnyReference, vector: Tensor | None) -> Tensor:
        """Move the bases of a reference by a power step; the vector that errors are about."""

    @abstractmethod
    def _movements(self, vector: Tensor) -> list[float]:
        """How far the last power step moved P_k v, relative to norm(v)."""

    @abstractmethod
    def _sampling_errors(self, vector: Tensor) -> list[float]:
        """Estimated sampling errors of P_k v at the last power step, relative to norm(v)."""

    # What they have in common:

    def _begin(self, runs: int) -> None:
        """Solve for every basis from scratch."""
        costs = [self._solve(range(runs)), self._renew(solved=True)]
        self._report([self.tolerance] * runs, _sums(costs), renewed=True)

    def _follow(self, reference: AnyReference, vector: Tensor | None) -> None:
        """One step: a power step or two by the subset; a new reference, if that is not enough."""
        vector = self._power_step(reference, vector)
        passes = 1
        if self.policy.wants_second_step(max(self._biases(vector))):
            self._power_step(reference.turned(self._current().rows), vector)
            passes = 2
        sampling, biases = self._sampling_errors(vector), self._biases(vector)
        errors = [total(*parts) for parts in zip(sampling, biases, strict=True)]
        # With a size for the worst, nine runs counted 1.4 times the gradients of each by itself.
        typical = math.sqrt(sum(error**2 for error in sampling) / len(sampling))
        self.policy.record(typical, max(biases))
        subset, age = self.policy.subset, self.policy.age
        matvecs = passes * self.k + self.estimate_matvecs
        costs = [PRODUCT_COST * matvecs * subset / self.num_samples] * len(errors)
        if not self.policy.due(max(errors)):
            self._report(errors, costs, subset=subset, age=age)
            return
        before = self._current().project(vector)
        costs = _sums([costs, self._renew()])
        checked = relative(self._current().project(vector) - before, vector)
        for estimate, *seen in zip(self._estimates, checked, sampling, biases, strict=True):
            estimate.learn(*seen)
        left = [e.left(error) for e, error in zip(self._estimates, checked, strict=True)]
        self._report(left, costs, renewed=True, subset=subset, checked=checked)

    def _renew(self, *, solved: bool = False) -> list[float]:
        """A product over all samples: a new reference, a power step; the cost by run.

        Args:
            solved: the bases have just been found from scratch.
        """
        self._take_reference(self._current().rows)
        passes = 1 + self.renewal_passes * self.policy.subset / self.num_samples
        looks, overtaken = self._look_at_gaps()
        costs = [PRODUCT_COST * self.k * passes + look for look in looks]
        if solved or not overtaken:
            return costs
        # An eigenvector of the bulk has overtaken one of S_k: no power step brings it in.
        for run in overtaken:
            self._estimates[run].gap.forget()
        return _sums([costs, _sums([self._solve(overtaken), self._renew(solved=True)])])

    def _look_at_gaps(self) -> tuple[list[float], list[int]]:
        """Find lambda_{k+1} where that is due; the cost by run, and runs where it is above S_k."""
        costs, overtaken = [], []
        pairs = self._current().eigenpairs_by_run()
        for run, (estimate, (values, rows)) in enumerate(zip(self._estimates, pairs, strict=True)):
            matvecs = estimate.look_at_gap(lambda run=run: self._operator(run), rows, values)
            costs.append(PRODUCT_COST * matvecs)
            if estimate.overtaken(float(values[-1]), self.tolerance):
                overtaken.append(run)
        return costs, overtaken

    def _biases(self, vector: Tensor) -> list[float]:
        """What the last power step is estimated to have left, relative to norm(v)."""
        moved = self._movements(vector)
        return [estimate.bias(m) for estimate, m in zip(self._estimates, moved, strict=True)]

    def _current(self) -> AnyStep:
        if self._step is None:
            raise InvalidInput("the tracker has no subspace yet; call update() first")
        return self._step

    def _report(
        self,
        errors: Sequence[float],
        costs: Sequence[float],
        *,
        renewed: bool = False,
        subset: int = 0,
        age: int = 0,
        checked: Sequence[float] | None = None,
    ) -> None:
        known = [None] * len(errors) if checked is None else checked
        self.reports = [
            TrackerReport(error, cost, renewed, subset, age, check, estimate.gap.value)
            for error, cost, check, estimate in zip(
                errors, costs, known, self._estimates, strict=True
            )
        ]

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue bit for bit: bases as rows, so that their layout stays."""
        return {
            "generator": self._generator.get_state(),
            "reports": [vars(report).copy() for report in self.reports],
            "estimates": [estimate.state_dict() for estimate in self._estimates],
            "step": None if self._step is None else vars(self._step).copy(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave, the way to multiply by the Hessian included."""
        self._generator.set_state(state["generator"].cpu())
        self.reports = [TrackerReport.from_state(report) for report in state["reports"]]
        for estimate, saved in zip(self._estimates, state["estimates"], strict=True):
            estimate.load_state_dict(saved)


def _sums(costs: Iterable[Sequence[float]]) -> list[float]:
    """The costs of each run, of several lists by run."""
    return [sum(parts) for parts in zip(*costs, strict=True)]
