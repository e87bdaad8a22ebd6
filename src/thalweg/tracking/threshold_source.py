"""Splits updates at a curvature tau, without a gap and without a k; a `SubspaceSource`.

The dominant part of a vector is f(H) v, f a smooth step at tau: see `split_at`. It costs some
products for each vector (`benchmarks/threshold.py`: 8 to 16 at tau = 0.1 lambda_1), since the
Hessian turns from step to step by more than the target error, and what was known of it with it.
Where it turns little, products over few samples that are corrected at a reference serve for some
steps: `filter_reference.py`. Their error is estimated at every step, and where it exceeds the
target the vector is split over all samples, and the reference is taken anew. Which part of the
samples pays is found out by counted products, never by a clock.

Example:
    >>> import torch
    >>> from thalweg.loss.objective import Objective
    >>> from thalweg.optim.split import SplitUpdate
    >>> model, data = torch.nn.Linear(3, 1), (torch.randn(32, 3), torch.randn(32, 1))
    >>> loss, base = torch.nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1)
    >>> source = ThresholdSource(Objective(model, loss, data), 0.5, relative=True)
    >>> optimizer = SplitUpdate(base, source, dominant=0.0, bulk=1.0)
    >>> loss(model(data[0]), data[1]).backward()
    >>> optimizer.step()
    >>> source.report.target_met, source.threshold < source.subspace.eigenvalues[0]
    (True, tensor(True))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from thalweg.errors import InvalidInput, invalid
from thalweg.linalg import is_zero, norm, orthonormalize
from thalweg.loss.protocol import Loss
from thalweg.operators.hessian import PRODUCT_COST, Hessian
from thalweg.operators.preconditioned import Preconditioned
from thalweg.operators.symmetric import SymmetricOperator
from thalweg.sharding import packed, sharding_of, unpacked
from thalweg.spectrum.curvature_profile import MAX_MATVECS, WIDTH, check_settings, check_threshold
from thalweg.spectrum.lanczos import LanczosSpace
from thalweg.spectrum.metric_subspace import from_metric, to_metric
from thalweg.spectrum.subspace import Subspace
from thalweg.spectrum.threshold_split import filter_start
from thalweg.tracking.filter_reference import FilterReference, drawn_halves
from thalweg.tracking.preconditioner import metric_of, require_preconditioner
from thalweg.tracking.source import Split, TrackerReport
from thalweg.tracking.wrapping import unwrapped

# Parts of the samples that are tried, one after the other.
FRACTIONS = (1 / 16, 1 / 8, 1 / 4)
# Fewer samples in a half say nothing.
FEWEST_IN_A_HALF = 16
# Updates over all samples before the parts are tried again, once none has paid.
REST = 100


class ThresholdSource:
    """Splits vectors at a curvature; a `SubspaceSource`.

    Args:
        objective: the loss.
        threshold: tau > 0, in units of the operator; a function is asked at every update, such as
            `edge_of_stability(optimizer)`.
        relative: take it as a part of the largest curvature seen from the vector, which is
            lambda_1 where the vector has a part along u_1.
        optimizer: split in the metric of Adam, AdamW or RMSprop: the operator is
            D^-1/2 (H + w I) D^-1/2, see `OptimizerMetricSource`; None for the Euclidean split.
        width: of the step, in units of the threshold.
        error: target, of either part relative to the vector's norm (in the metric, if one is).
        max_matvecs: the most products for a vector.
        few_samples: try products over few samples. Without, the memory of a reference is saved,
            three times the products of a vector.
        seed: of those samples.

    Attributes:
        threshold: tau of the last update.
        report: what the last update cost and how far it can be trusted. `subset` is the number of
            samples of the products, `age` the updates since products over all of them.

    Raises:
        InvalidInput: a setting out of its range; an optimizer without such a metric.
    """

    def __init__(
        self,
        objective: Loss,
        threshold: float | Callable[[], float],
        *,
        relative: bool = False,
        optimizer: Optimizer | None = None,
        width: float = WIDTH,
        error: float = 0.01,
        max_matvecs: int = MAX_MATVECS,
        few_samples: bool = True,
        seed: int = 0,
    ) -> None:
        check_settings(error, width, max_matvecs)
        if not callable(threshold):
            check_threshold(threshold)
            if relative and not threshold < 1:
                raise invalid("threshold", threshold, "below 1, as a part of lambda_1")
        self.objective = objective
        self.optimizer = None if optimizer is None else unwrapped(optimizer).base
        if self.optimizer is not None:
            require_preconditioner(self.optimizer)
        self._given = threshold
        self._filter = partial(
            filter_start, relative=relative, width=width, error=error, max_matvecs=max_matvecs
        )
        self._error = error
        self.threshold = math.nan
        self.report = TrackerReport(math.nan, 0.0, False, 0, 0)
        self._theta: Tensor | None = None
        self._diagonal: Tensor | None = None
        self._shift = 0.0
        self._subspace: Subspace | None = None
        self._known: tuple[Tensor, Split] | None = None
        self._reference: FilterReference | None = None
        self._plan = _Plan(few_samples and _has_enough(objective.num_samples))
        self._generator = torch.Generator().manual_seed(seed)

    def ask(self, threshold: Callable[[], float]) -> None:
        """Ask a function for the threshold from now on, at every update."""
        self._given = threshold

    @property
    def subspace(self) -> Subspace:
        """What the last update's products saw above tau: Ritz vectors, at least one.

        With an optimizer's metric, in the coordinates D^1/2 theta. As a basis of what is above tau
        it serves the vector of the update alone: `split` serves any.

        Raises:
            InvalidInput: there was no update yet.
        """
        if self._subspace is None:
            raise InvalidInput("there is no split yet; call update() first")
        return self._subspace

    def update(self, theta: Tensor | None = None, vector: Tensor | None = None) -> Subspace:
        """Move on to a point, and split a vector there.

        Args:
            theta: the point (P,); None for the model's current parameters.
            vector: (P,); None for the gradient.

        Raises:
            Diverged: the loss or a product is NaN or infinite.
        """
        self._theta = self.objective.theta() if theta is None else theta
        if self.optimizer is not None:
            self._diagonal, self._shift = metric_of(self.optimizer, self.objective)
        extra = 0.0
        if vector is None:
            vector, extra = self.objective.value_and_gradient(self._theta)[1], 1.0
        self._known = (vector, self._split(vector, extra))
        return self.subspace

    def split(self, vector: Tensor) -> Split:
        """Split a vector (P,) at the last update's point; that update's own vector costs nothing.

        Raises:
            InvalidInput: there was no update yet.
        """
        if self._known is None or self._theta is None:
            raise InvalidInput("there is no split yet; call update() first")
        if self._known[0] is vector:
            return self._known[1]
        scaled = self._to_metric(vector)
        if is_zero(scaled):
            return self._as_split(vector, torch.zeros_like(scaled), 0.0, 0.0)
        space = self._space(self._operator(self.objective, self._theta), scaled)
        found = self._filter(space, self._asked())
        return self._as_split(vector, found.above * norm(scaled), found.error, _cost(space, 1.0))

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue bit for bit; an optimizer's own state is not in it."""
        subspace = self._subspace
        state = {
            "threshold": self.threshold,
            "report": vars(self.report).copy(),
            "rows": None if subspace is None else subspace.basis.T,
            "eigenvalues": None if subspace is None else subspace.eigenvalues,
            "reference": None if self._reference is None else self._reference.state_dict(),
            "plan": vars(self._plan).copy(),
            "generator": self._generator.get_state(),
        }
        return packed(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        state = unpacked(state, sharding_of(self.objective))
        self.threshold = state["threshold"]
        self.report = TrackerReport.from_state(state["report"])
        self._subspace = None
        if state["rows"] is not None:
            self._subspace = Subspace(state["rows"].T, state["eigenvalues"])
        known = state["reference"]
        self._reference = None if known is None else FilterReference.from_state(known)
        self._plan = _Plan(**state["plan"])
        self._generator.set_state(state["generator"])
        self._known = self._theta = None

    def _split(self, vector: Tensor, extra: float) -> Split:
        """Split the update's vector; by few samples where that is good enough."""
        scaled = self._to_metric(vector)
        if is_zero(scaled):
            self.report = TrackerReport(0.0, extra, False, 0, self.report.age + 1)
            if self._subspace is None:
                raise InvalidInput("update: got the zero vector, allowed: one to begin with")
            return self._as_split(vector, torch.zeros_like(scaled), 0.0, 0.0)
        rough = self._by_few_samples(scaled)
        if rough is not None and rough.error <= self._error:
            self._plan.kept += 1
            return self._take(vector, scaled, rough, extra)
        spent = 0.0 if rough is None else rough.cost
        fine = self._by_all_samples(scaled)
        checked = None if rough is None else float(norm(rough.above - fine.above))
        return self._take(vector, scaled, fine, extra + spent, checked)

    def _by_few_samples(self, scaled: Tensor) -> _Result | None:
        """The mean over both halves; None without a reference."""
        reference = self._reference
        if reference is None:
            return None
        assert self._theta is not None
        operators = reference.corrected(self._operator, self.objective, self._theta)
        spaces = [self._space(operator, scaled) for operator in operators]
        one, other = (self._filter(space, self._asked()) for space in spaces)
        apart = float(norm(one.above - other.above)) / 2
        error = math.hypot(apart, max(one.error, other.error))
        samples = sum(len(half) for half in reference.halves)
        part = samples / self.objective.num_samples
        self._plan.spent = sum(space.num_matvecs for space in spaces) / 2 * part
        above, tau = (one.above + other.above) / 2, (one.threshold + other.threshold) / 2
        return _Result(above, tau, error, PRODUCT_COST * self._plan.spent, spaces[0], samples)

    def _by_all_samples(self, scaled: Tensor) -> _Result:
        """From scratch; takes a new reference where few samples are to be tried from here on."""
        assert self._theta is not None
        space = self._space(self._operator(self.objective, self._theta), scaled)
        found = self._filter(space, self._asked())
        cost = _cost(space, 1.0)
        fraction = self._plan.renewed(space.num_matvecs)
        self._reference = None
        if fraction is not None:
            count = 2 * max(FEWEST_IN_A_HALF, int(self.objective.num_samples * fraction / 2))
            device = self.objective.device
            halves = drawn_halves(self.objective.num_samples, count, self._generator, device)
            self._reference = FilterReference.at(
                space, self._operator, self.objective, self._theta, halves
            )
            cost += _cost(space, count / self.objective.num_samples) / 2
        total = self.objective.num_samples
        return _Result(found.above, found.threshold, found.error, cost, space, total)

    def _take(
        self,
        vector: Tensor,
        scaled: Tensor,
        result: _Result,
        extra: float,
        checked: float | None = None,
    ) -> Split:
        renewed = result.samples == self.objective.num_samples
        self.threshold = result.threshold
        self._subspace = _ritz_above(result.space, result.threshold)
        met = result.error <= self._error
        self.report = TrackerReport(
            result.error,
            result.cost + extra,
            renewed,
            result.samples,
            0 if renewed else self.report.age + 1,
            checked_error=checked,
            target_met=met,
            caveat="" if met else "the split is less exact than asked for",
        )
        return self._as_split(vector, result.above * norm(scaled), result.error, 0.0)

    def _as_split(self, vector: Tensor, scaled: Tensor, error: float, cost: float) -> Split:
        above = scaled if self._diagonal is None else from_metric(scaled, self._diagonal)
        above = above.to(vector.dtype)
        bulk = vector - above
        length, left = float(norm(self._to_metric(vector))), float(norm(self._to_metric(bulk)))
        bulk_error = error * length / left if left > 0 else 0.0
        return Split(above, bulk, error, bulk_error, subspace_cost=cost)

    def _asked(self) -> float:
        tau = self._given() if callable(self._given) else self._given
        check_threshold(tau)
        return tau

    def _to_metric(self, vector: Tensor) -> Tensor:
        return vector if self._diagonal is None else to_metric(vector, self._diagonal)

    def _space(self, operator: SymmetricOperator, scaled: Tensor) -> LanczosSpace:
        return LanczosSpace(operator, scaled[:, None])

    def _operator(
        self,
        objective: Loss,
        theta: Tensor | None = None,
        samples: Tensor | None = None,
        *,
        keep_graph: bool = True,
    ) -> SymmetricOperator:
        """The Hessian, in the metric where there is one."""
        hessian = Hessian(objective, theta, samples, keep_graph=keep_graph)
        if self._diagonal is None:
            return hessian
        return Preconditioned(hessian, self._diagonal, shift=self._shift)


@dataclass(frozen=True)
class _Result:
    """A unit vector's part above tau, and what it took."""

    above: Tensor
    threshold: float
    error: float
    cost: float
    space: LanczosSpace
    samples: int


@dataclass
class _Plan:
    """Which part of the samples to try, by what the last ones saved.

    Attributes:
        tries: whether few samples are tried at all.
        at: the index in `FRACTIONS`; its length while resting.
        kept: updates that few samples served since the reference.
        spent: products over all samples that one of them took.
        rested: updates since none paid.
        begun: whether there was a reference.
    """

    tries: bool
    at: int = 0
    kept: int = 0
    spent: float = 0.0
    rested: int = 0
    begun: bool = False

    def renewed(self, products: int) -> float | None:
        """The part of the samples for a new reference, after so many products over all of them.

        The last one has paid where `kept` times those products are more than what it took: the
        products over few samples, also the failed ones, and its own.
        """
        if not self.tries:
            return None
        if self.at == len(FRACTIONS):
            self.rested += 1
            if self.rested < REST:
                return None
            self.at, self.begun = 0, False
        elif self.begun:
            took = (self.kept + 1) * self.spent + products * FRACTIONS[self.at]
            if self.kept * products <= took:
                self.at += 1
        self.kept, self.rested = 0, 0
        if self.at == len(FRACTIONS):
            return None
        self.begun = True
        return FRACTIONS[self.at]


def _has_enough(num_samples: int) -> bool:
    return num_samples * FRACTIONS[-1] >= 2 * FEWEST_IN_A_HALF


def _cost(space: LanczosSpace, part: float) -> float:
    return PRODUCT_COST * space.num_matvecs * part


def _ritz_above(space: LanczosSpace, threshold: float) -> Subspace:
    """Ritz vectors with values above a threshold, at least one, by value."""
    values, vectors = torch.linalg.eigh(space.compression().projected)
    count = max(1, int((values > threshold).sum()))
    values, vectors = values.flip(0)[:count], vectors.flip(1)[:, :count]
    basis = orthonormalize(space.combine(vectors))
    return Subspace(basis, values.to(basis))
