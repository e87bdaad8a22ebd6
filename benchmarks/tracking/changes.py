"""The tracker with one thing changed: what the cost of each change is measured on."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from thalweg.operators.hessian import PRODUCT_COST, Hessian
from thalweg.tracking.reference import Reference
from thalweg.tracking.refresh_policy import SECOND_STEP, RefreshPolicy
from thalweg.tracking.tracker import SubspaceTracker
from tracking.recording import K, Replay

FIRST_ONLY = 10**9


@dataclass(frozen=True)
class Setting:
    """By clock: a share of the samples and a period; by estimate: a target error."""

    target: float = math.inf
    share: float = 0.0
    period: int = 0

    def __str__(self) -> str:
        if self.period:
            return f"{self.share:.0%} of N, every {self.period}"
        return f"target {self.target:.1%}"


class Clock(RefreshPolicy):
    """Subset size and period stay."""

    def plan(self) -> None:
        self.history = []


class Unchanged(SubspaceTracker):
    """The tracker as it is, but that it looks at the gap once only."""

    guards = 0
    gap_looks = FIRST_ONLY
    second_step = SECOND_STEP

    def __init__(self, replay: Replay, setting: Setting, seed: int) -> None:
        self.labels, self.seed = replay.labels, seed
        super().__init__(
            replay.objective,
            K + self.guards,
            error=setting.target,
            gap_every=self.gap_looks,
            seed=seed,
        )
        if setting.period:
            N = self.num_samples
            size = 2 * round(setting.share * N / 2)
            self._anchors._first_policy = Clock(N, math.inf, subset=size, period=setting.period)

    def dominant(self, vector: Tensor) -> Tensor:
        """P_k v by the first k rows."""
        rows = self._current().rows[:K]
        return rows.T @ (rows @ vector)


class GapLookedAt(Unchanged):
    gap_looks = 10


class OneStep(Unchanged):
    second_step = math.inf


class TwoSteps(Unchanged):
    second_step = -math.inf


class TwoGuards(Unchanged):
    guards = 2


class FiveGuards(Unchanged):
    guards = 5


class LowPrecision(Unchanged):
    """Products over a subset have a forward pass in bfloat16."""

    def __init__(self, replay: Replay, setting: Setting, seed: int) -> None:
        super().__init__(replay, setting, seed)
        self.low = replay.in_bfloat16
        self.low.multiplier = copy.deepcopy(replay.objective.multiplier)
        self.operator = self._in_low_precision

    def _in_low_precision(
        self, objective, theta=None, samples=None, *, keep_graph=False
    ) -> Hessian:
        objective = objective if samples is None else self.low
        return Hessian(objective, theta, samples, keep_graph=keep_graph)


class Kept(Unchanged):
    """The subset is drawn in one order for the whole run, a larger one with the smaller in it."""

    def _reference(self, rows: Tensor, size: int) -> tuple[Reference, Tensor]:
        self._generator.manual_seed(self.seed)
        return super()._reference(rows, size)


class Composed(Unchanged):
    """A renewal whose parts can be replaced."""

    def order(self) -> Tensor:
        """The samples in the order in which subsets take them."""
        return torch.randperm(self.num_samples, generator=self._generator)

    def products(self, rows: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
        """Products over all samples, the subset and its first half; the subset; samples touched."""
        first, second = (half.sort().values for half in self.order()[:size].tensor_split(2))
        subset = torch.cat([first, second])
        whole, sampled, half = (self.multiply(part, rows) for part in (None, subset, first))
        return whole, sampled, half, subset, self.num_samples + 1.5 * size

    def multiply(self, samples: Tensor | None, rows: Tensor) -> Tensor:
        return (self._curvature(samples) @ rows.T).T

    def _reference(self, rows: Tensor, size: int) -> tuple[Reference, Tensor]:
        whole, sampled, half, subset, self.touched = self.products(rows, size)
        return Reference(rows, whole - sampled, whole - half, subset), whole

    def _renew(self, *, solved: bool = False) -> list[float]:
        (cost,) = super()._renew(solved=solved)
        counted = self.num_samples + 1.5 * self.policy.subset
        return [cost + PRODUCT_COST * self.k * (self.touched - counted) / self.num_samples]


class Stratified(Composed):
    """Any stretch of the order has every class by its share."""

    def order(self) -> Tensor:
        shuffled = super().order()
        labels = self.labels[shuffled]
        place = torch.empty(self.num_samples, dtype=torch.float64)
        for label in labels.unique():
            (members,) = torch.nonzero(labels == label, as_tuple=True)
            offset = torch.rand((), generator=self._generator, dtype=torch.float64)
            place[members] = (torch.arange(len(members)) + offset) / len(members)
        return shuffled[place.argsort(stable=True)]


class InParts(Composed):
    def products(self, rows: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
        order = self.order()
        parts = [p.sort().values for p in (*order[:size].tensor_split(2), order[size:])]
        first, second, rest = (self.multiply(part, rows) for part in parts)
        a, b, c = (len(part) for part in parts)
        sampled = (a * first + b * second) / (a + b)
        whole = ((a + b) * sampled + c * rest) / (a + b + c)
        return whole, sampled, first, torch.cat(parts[:2]), self.num_samples


class NoEstimate(Composed):
    def products(self, rows: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
        subset = self.order()[:size].sort().values
        whole, sampled = self.multiply(None, rows), self.multiply(subset, rows)
        return whole, sampled, sampled, subset, self.num_samples + size

    def _movements(self, vector: Tensor) -> list[float]:
        return [0.0]

    def _sampling_errors(self, vector: Tensor) -> list[float]:
        return [0.0]

    def update(self, theta: Tensor | None = None, vector: Tensor | None = None):
        result = super().update(theta, vector)
        saved = PRODUCT_COST * self.report.subset / self.num_samples
        self.reports = [replace(self.report, subspace_cost=self.report.subspace_cost - saved)]
        return result


class Advanced(Unchanged):
    """What the subset misses (offset) changes linearly with coordinates of the step's theta."""

    def __init__(self, replay: Replay, setting: Setting, seed: int) -> None:
        super().__init__(replay, setting, seed)
        self.slopes: list[tuple[Tensor, Tensor]] = []

    def coordinates(self) -> list[float]:
        raise NotImplementedError

    def _power_step(self, reference: Reference, vector: Tensor | None) -> Tensor:
        offset, first = reference.offset, reference.offset_first
        for coordinate, slopes in zip(self.coordinates(), self.slopes, strict=True):
            offset = offset + coordinate * slopes[0]
            first = first + coordinate * slopes[1]
        changed = replace(reference, offset=offset, offset_first=first)
        return super()._power_step(changed, vector)


class InTime(Advanced, Kept):
    """The subset must be kept: the change of its offset is known from two references then."""

    def coordinates(self) -> list[float]:
        return [self.policy.age + 1.0] * len(self.slopes)

    def _renew(self, *, solved: bool = False) -> list[float]:
        age = self.policy.age
        before = self._anchors.reference if self._anchors._all else None
        costs = super()._renew(solved=solved)
        if before is not None:
            new = self._anchors.reference
            old = before.turned(new.rows)
            changes = new.offset - old.offset, new.offset_first - old.offset_first
            self.slopes = [(changes[0] / age, changes[1] / age)]
        return costs


class Third(Advanced):
    """Third derivatives of the loss, in the top directions only: each costs as much as a renewal.

    The difference is over 0.1, about as far as SGD moves along such a direction.
    """

    directions = 1
    distance = 0.1

    def coordinates(self) -> list[float]:
        assert self._theta is not None
        moved = self._theta - self._anchors._all[self._anchors._serving].theta
        return (self.along @ moved).tolist()

    def _renew(self, *, solved: bool = False) -> list[float]:
        (cost,) = super()._renew(solved=solved)
        reference, theta = self._anchors.reference, self._theta
        assert theta is not None
        self.along, self.slopes = self._current().rows[: self.directions], []
        for direction in self.along:
            self._theta = theta + self.distance * direction
            parts = (None, reference.subset, reference.first_half)
            whole, sampled, half = ((self._curvature(part) @ reference.rows.T).T for part in parts)
            changes = whole - sampled - reference.offset, whole - half - reference.offset_first
            self.slopes.append((changes[0] / self.distance, changes[1] / self.distance))
            touched = 1 + 1.5 * len(reference.subset) / self.num_samples
            cost += PRODUCT_COST * self.k * touched
        self._theta = theta
        return [cost]


class ThreeThird(Third):
    directions = 3


CHANGES: dict[str, type[Unchanged]] = {
    "stratified": Stratified,
    "kept subset": Kept,
    "2 guards": TwoGuards,
    "5 guards": FiveGuards,
    "in time": InTime,
    "third, 1": Third,
    "third, 3": ThreeThird,
    "bfloat16": LowPrecision,
    "no estimate": NoEstimate,
    "one step": OneStep,
    "two steps": TwoSteps,
    "in parts": InParts,
    "gap looked at": GapLookedAt,
}
CLOCK_ONLY = {"2 guards", "5 guards", "in time", "third, 1", "third, 3", "no estimate", "two steps"}
ESTIMATE_ONLY = {"one step", "gap looked at"}
