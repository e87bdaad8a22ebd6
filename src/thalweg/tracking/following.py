"""How eigenspaces are followed from one training step to the next: the algorithm, for R >= 1 runs.

A reference and a small sample. At a reference point theta_r keep an orthonormal block U (P, b) and
Y_r = H(theta_r) U over all N samples. At a later step multiply the same U by the Hessian of a fixed
small subset B only, and correct the reference by the difference (a control variate):

    Y_t = Y_r + (H_B(theta_t) U - H_B(theta_r) U),    new block = orth(Y_t V)

a warm power step, V the eigenvectors of U^T Y_t. Of the block the first k vectors are the basis,
the others guard vectors, which it has where the gap below lambda_k is narrow. Each part is one
file:

- `reference.py`: the products, corrected.
- `power_step.py`: the new block.
- `error_estimate.py`: how wrong the new basis is.
- `bulk_edge.py`: what lies below the block, and how many guard vectors it needs.
- `refresh_policy.py`: how many samples B has, whether a second power step follows at once, as at
  the edge of stability, where the basis turns much from one step to the next, and when a fresh
  product over all samples renews the reference.
- `escalation.py`: whether to follow at all, or to begin with a renewal or a solve.

Here is their order, and what a step costs, in gradients of the full loss: one product with all N
samples counts as `PRODUCT_COST`. `SubspaceTracker` and `LockstepTracker` do the arithmetic.

Source: subspace iteration with Rayleigh-Ritz (Saad 2011, "Numerical Methods for Large Eigenvalue
Problems", section 5.2), its products by a control variate as gradients are in SVRG (Johnson, Zhang
2013).
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from thalweg.errors import InvalidInput, invalid
from thalweg.linalg import dot, norm, reject, squared_norm
from thalweg.operators.hessian import PRODUCT_COST
from thalweg.operators.symmetric import SymmetricOperator
from thalweg.spectrum.eigensolver import SolvedBlock, solve_block
from thalweg.spectrum.gap import VANISHED, Gap, next_eigenpair
from thalweg.tracking.bulk_edge import (
    LOOK_EVERY,
    MOST_GUARDS,
    WIDE,
    BulkEdge,
    guards_wanted,
    reach,
)
from thalweg.tracking.error_estimate import ROUNDING, bias, relative, total, turn
from thalweg.tracking.escalation import FOLLOW, RENEW, SOLVE, Escalation
from thalweg.tracking.power_step import LockstepPowerStep, PowerStep, rotate_to_ritz
from thalweg.tracking.reference import LockstepReference, Reference
from thalweg.tracking.refresh_policy import RefreshPolicy
from thalweg.tracking.source import TargetMissed, TrackerReport, check_dimension, check_target

FEWEST_SAMPLES = 8
"""Of fewer samples no subset is followed."""
FAR = 0.3
"""Sine of an angle by which a basis has turned too far for estimates of first order."""
TOO_FAR = 0.5
"""Where even another renewal would not do."""
NARROW = 0.8
"""lambda_{b+1} / lambda_k, by its trend, from which on the block needs another guard vector."""
MORE = 1.2
"""A thorough look has found something new where it is so many times what was known."""
SMALL = 0.25
"""A bias below this fraction of the target is measured at every `MEASURE_EVERY`th step only, from
the step `SETTLED` of a reference on."""
SETTLED, MEASURE_EVERY = 2, 4
SOLVE_AIM = 0.2
"""The residual of a solve may be this fraction of what the target allows without a gap."""

AnyStep = TypeVar("AnyStep", PowerStep, LockstepPowerStep)
AnyReference = TypeVar("AnyReference", Reference, LockstepReference)


@dataclass(frozen=True)
class Seen:
    """What a power step shows of the error of one run's P_k v, relative to norm(v).

    Attributes:
        sampling: the estimated sampling error, mixing in the block included.
        moved: how far the step moved the projection out of the block.
        content: see `error_estimate.py`.
    """

    sampling: float
    moved: float
    content: float


@dataclass
class Outcome:
    """How an update went, by run: what its report says."""

    errors: list[float]
    costs: list[float]
    renewed: bool = False
    subset: int = 0
    age: int = 0
    checked: list[float] | None = None


class Following(ABC, Generic[AnyStep, AnyReference]):
    """Base of trackers: follows the top-k eigenspace of each of R runs, R = 1 included.

    Lists have a number for each run. Subset, renewals and the number of guard vectors are common to
    all runs: the size is chosen for the typical run, and a renewal comes when the worst run needs
    it.

    Args:
        num_parameters: P.
        num_samples: N.
        k: dimension of the subspaces.
        error: target for norm(tracked - P_k v) / norm(v).
        tolerance: residual of solves from scratch, see `top_eigenpairs`; it becomes finer where the
            target needs that, for a lambda_k far below lambda_1.
        gap_every: renewals of the reference from one thorough look at lambda_{k+1} to the next.
        seed: of the subsets.

    Attributes:
        reports: what the last update cost each run, and how far its subspace can be trusted.

    Raises:
        InvalidInput: k < 1 or k > P, a target that is not positive, a negative `gap_every`.
    """

    follows_guards: bool
    """Whether the block may have guard vectors."""
    exact: bool = False
    """Whether every update solves from scratch."""
    budget: float = math.inf
    """Gradients that one update may cost."""
    sampling_matvecs: float
    """Products of the whole subset with one vector that an estimate of the sampling error takes."""
    reference_matvecs: float
    """Products with the whole subset that a reference takes for each vector of a block."""

    def __init__(
        self,
        num_parameters: int,
        num_samples: int,
        k: int,
        *,
        error: float,
        tolerance: float,
        gap_every: int,
        seed: int,
    ) -> None:
        check_dimension(k, num_parameters)
        check_target(error)
        if gap_every < 0:
            raise invalid("gap_every", gap_every, "an integer >= 0")
        self.num_samples = num_samples
        self.k = k
        self.error = error
        self.tolerance = tolerance
        self.gap_every = gap_every
        self.reports: list[TrackerReport] = []
        self._generator = torch.Generator().manual_seed(seed)
        self._edges: list[BulkEdge] = []
        self._escalation = Escalation()
        self._step: AnyStep | None = None
        # Blocks and looks of the last renewal, with their products, as rows, while an update runs.
        self._fresh: tuple[Tensor, Tensor] | None = None
        # The last solve's.
        self._solve_cost = math.nan
        # What products with the movement have shown last, by run, and the bias of the last step.
        self._contents: list[float] = []
        # What the last power step has shown, by run, while an update runs.
        self._last_seen: list[Seen] = []
        self._biased = math.inf
        # Of the first k eigenvalues at the last product with all samples, by run.
        self._value_errors: list[tuple[float, ...]] = []
        # Where no power step could follow the solve: the angles of its bases, by run.
        self._bare: list[float] | None = None

    # What one run and many in one computation do each in their own way:

    @property
    @abstractmethod
    def policy(self) -> RefreshPolicy:
        """How many samples are followed, and when the references are renewed."""

    @abstractmethod
    def _operator(self, run: int) -> SymmetricOperator:
        """The operator over all samples at a run's theta, for many products."""

    def _solved_with(self, operator: SymmetricOperator, solved: SolvedBlock) -> None:
        """An operator over all samples has its graph: it may serve a while."""

    @abstractmethod
    def _multiply(self, rows: Tensor) -> Tensor:
        """Products with all samples, as rows (..., c, P)."""

    @abstractmethod
    def _step_from(self, rows: Tensor, images: Tensor) -> AnyStep:
        """The power step of blocks (..., b, P), from their products with all samples."""

    @abstractmethod
    def _serve(self) -> AnyReference | None:
        """The reference to follow from; None where there is none."""

    @abstractmethod
    def _follow_from(self, reference: AnyReference, vector: Tensor | None) -> Tensor:
        """Move the blocks of a reference by a power step; the vector that errors are about."""

    @abstractmethod
    def _draw_subset(self) -> None:
        """Plan the next reference: the size of its subset, and the samples."""

    @abstractmethod
    def _take_reference(self, rows: Tensor, images: Tensor) -> None:
        """Multiply blocks by the subset that was drawn, so that they can be followed."""

    @abstractmethod
    def _drop_references(self) -> None:
        """Give them up: the next update begins with a renewal or a solve."""

    @abstractmethod
    def _seen(self, vector: Tensor, *, measured: bool) -> list[Seen]:
        """What the last power step shows of the errors of P_k v.

        Args:
            vector: v.
            measured: whether to multiply its movement; else `Seen.content` is that of the last
            time.
        """

    @abstractmethod
    def _spectrum(self, run: int) -> Tensor:
        """The eigenvalues of a run that are known without waiting for a device, (n,), n >= k."""

    @abstractmethod
    def _gradient(self) -> Tensor:
        """The vector that errors are about, where none is given and no subset has shown one."""

    @abstractmethod
    def _step_without(self, rows: Tensor, values: Tensor) -> AnyStep:
        """Blocks (..., b, P) of these eigenvalues (..., b), as they are."""

    @abstractmethod
    def _joined(self, parts: list[Tensor]) -> Tensor:
        """What is there for each run, as one tensor."""

    @abstractmethod
    def _eigenvalue_errors(self) -> list[tuple[float, ...]]:
        """Of the first k eigenvalues of each run; empty where not known."""

    @property
    @abstractmethod
    def _content_part(self) -> float:
        """What an error estimate takes, in products with all samples."""

    def _leaped(self) -> bool:
        """Whether theta has jumped so far that nothing known can serve."""
        return False

    # What they have in common:

    def _advance(self, vector: Tensor | None) -> None:
        """One update: the cheapest measure that meets the target."""
        begins = self._escalation.begins
        first = self._step is None
        if first or self.exact or self._leaped() or self._is_negative() or self._was_cut():
            begins = SOLVE
        for edge in self._edges:
            edge.pass_by()
        reference = self._serve() if begins == FOLLOW else None
        if begins == FOLLOW and reference is None:
            begins = RENEW
        costs, errors = [0.0] * len(self._edges), [math.inf] * len(self._edges)
        before, planned, at_once = None, False, True
        subset = age = 0
        if reference is not None:
            vector, errors = self._follow(reference, vector, costs)
            subset, age = self.policy.subset, self.policy.age
            missed = not max(errors) <= self.error
            looked = not missed and self._look(costs)
            if not (missed or looked or self.policy.due(max(errors))):
                self._escalation.note(FOLLOW)
                self._report(self._stated(), costs, subset=subset, age=age)
                return
            before = self._current().project(vector)
            planned, at_once = not missed, missed and age <= 1
        reached = FOLLOW if planned else RENEW
        if not self.exact:
            self._draw_subset()
        wrong = list(range(len(costs)))
        if begins != SOLVE:
            vector, errors = self._renew(vector, costs)
            wrong = self._wrong(errors)
        if begins == SOLVE or (wrong and self._affords(costs, self._solve_cost)):
            reached = SOLVE
            self._solve(wrong, costs)
            vector = self._gradient() if vector is None else vector
            errors = self._estimate(vector, costs)
        if not first:
            self._escalation.note(reached, at_once=at_once)
        if self.exact or self._escalation.begins != FOLLOW:
            self._drop_references()
        else:
            assert self._fresh is not None
            self._take_reference(*self._fresh)
            part = self.policy.subset / self.num_samples
            b = self._current().block.shape[-2]
            self._spend(costs, self.reference_matvecs * b * part)
        self._fresh = None
        checked = None
        if before is not None:
            assert vector is not None
            checked = relative(self._current().project(vector) - before, vector)
        self._report(errors, costs, renewed=True, subset=subset, age=age, checked=checked)

    def _follow(
        self, reference: AnyReference, vector: Tensor | None, costs: list[float]
    ) -> tuple[Tensor, list[float]]:
        """A power step or two by the subset; the vector, and the errors of its projection."""
        vector = self._follow_from(reference, vector)
        part = self.policy.subset / self.num_samples
        products = reference.rows.shape[-2] + self.sampling_matvecs
        self._spend(costs, products * part)
        parts = self._parts(vector, costs)
        if self.policy.wants_second_step(max(bias for _, bias in parts)):
            self._follow_from(reference.turned(self._current().block), vector)
            self._spend(costs, products * part)
            parts = self._parts(vector, costs)
        # With a size for the worst, nine runs counted 1.4 times the gradients of each by itself.
        typical = math.sqrt(sum(sampling**2 for sampling, _ in parts) / len(parts))
        self.policy.record(typical, max(bias for _, bias in parts))
        return vector, [total(*both) for both in parts]

    def _renew(self, vector: Tensor | None, costs: list[float]) -> tuple[Tensor, list[float]]:
        """A product of the blocks with all samples, or two; the vector, and its errors."""
        looked = False
        while True:
            rows = self._with_looks(self._current().block)
            images = self._multiply(rows)
            self._spend(costs, rows.shape[-2])
            self._settle(rows, images)
            vector = self._gradient() if vector is None else vector
            errors = self._estimate(vector, costs)
            if looked:
                return vector, errors
            looked = True
            more = self._look_thoroughly(costs)
            errors = self._stated()
            turned = max(self._turns())
            again = more or (turned <= TOO_FAR and bool(self._wrong(errors)))
            if not (again and self._affords(costs, PRODUCT_COST * rows.shape[-2])):
                return vector, errors

    def _solve(self, runs: Sequence[int], costs: list[float]) -> None:
        """Find the blocks of some runs from scratch; those of the others stay as they were."""
        found: dict[int, SolvedBlock] = {}
        for run in runs:
            operator = self._operator(run)
            allowed = (self.budget - costs[run]) / PRODUCT_COST
            solved = solve_block(
                operator,
                self.k,
                self._width,
                tolerance=self.tolerance,
                finer=self._needed,
                max_matvecs=allowed,
            )
            found[run] = self._padded(solved, operator)
            self._solved_with(operator, solved)
            self._solve_cost = PRODUCT_COST * solved.num_matvecs
            costs[run] += self._solve_cost
            self._edges[run].renewals = 0
        runs_known = range(len(self._edges))
        rows = [found[r].rows if r in found else self._known(r)[0] for r in runs_known]
        images = [found[r].images if r in found else self._known(r)[1] for r in runs_known]
        # Of a solve that the budget ended nothing is known: an eigenvector may be missing.
        angles = [
            (math.inf if found[r].cut else float(found[r].angles.max())) if r in found else 0.0
            for r in runs_known
        ]
        self._settle(self._joined(rows), self._joined(images), angles=angles)

    def _padded(self, solved: SolvedBlock, operator: SymmetricOperator) -> SolvedBlock:
        """With a look beside the basis, where the solve was done with k vectors."""
        if len(solved.rows) > self.k:
            return solved
        look = BulkEdge().start(solved.rows, self._generator)
        if look is None:
            return solved
        rows, image = torch.cat([solved.rows, look[None]]), operator @ look
        return replace(solved, rows=rows, images=torch.cat([solved.images, image[None]]))

    def _known(self, run: int) -> tuple[Tensor, Tensor]:
        """Block, look and products of the last renewal of one of many runs."""
        assert self._fresh is not None
        rows, images = self._fresh
        return rows[run], images[run]

    def _width(self, values: Tensor) -> int:
        """How many vectors a solve gives, its Ritz values known: basis, guard vectors, the look."""
        guards = guards_wanted(values, self.k, self._guards) if self.follows_guards else 0
        return min(self.k + guards + 1, len(values))

    @property
    def _guards(self) -> int:
        return 0 if self._step is None else self._step.block.shape[-2] - self.k

    def _needed(self, values: Tensor) -> float:
        """The residual that a solve needs for the target, given the first k Ritz values (k,).

        Residuals are relative to lambda_1: a small lambda_k asks for a smaller one.
        """
        needed = SOLVE_AIM * self.error * float(values[-1] / values[0])
        return needed if needed > 0 else math.inf

    def _settle(self, rows: Tensor, images: Tensor, *, angles: list[float] | None = None) -> None:
        """Move blocks, the look beside them, by products with all samples.

        Args:
            rows: (..., c, P), c > k but where that is P.
            images: their products.
            angles: of blocks just solved for, see `Subspace`.
        """
        rows, images, values = rotate_to_ritz(rows, images)
        before, width = self._guards, rows.shape[-2]
        by_run = values.reshape(-1, width)
        guards = 0
        if self.follows_guards:
            guards = max(guards_wanted(each, self.k, before) for each in by_run)
        b = min(self.k + guards, width)
        self._fresh = rows, images
        # No power step leads to eigenvectors of a negative eigenvalue.
        positive = bool((by_run[:, self.k - 1] > VANISHED * by_run[:, 0]).all())
        cut = angles is not None and math.inf in angles
        self._bare = None if angles is None or (positive and not cut) else angles
        squares = squared_norm(images).double().cpu().reshape(-1, width) - by_run.square()
        self._value_errors = [
            () if cut else self._off(*each, b, rows.dtype)
            for each in zip(by_run, squares, strict=True)
        ]
        block = rows[..., :b, :]
        if self._bare is None:
            self._step = self._step_from(block, images[..., :b, :])
        else:
            self._step = self._step_without(block, values[..., :b])
        for run, edge in enumerate(self._edges):
            look = None
            if width > b:
                look = images.reshape(-1, width, images.shape[-1])[run, b]
            edge.see(by_run[run], self.k, b, self._outside(run, look))
            edge.reached = reach(by_run[run], squares[run].clamp(min=0).sqrt(), self.k, b)

    def _off(
        self, values: Tensor, squares: Tensor, b: int, dtype: torch.dtype
    ) -> tuple[float, ...]:
        """How far the first k eigenvalues of the power step from Ritz vectors may be off.

        With R_ji the part of the residual of u_i along the eigenvector u_j of the bulk, the
        eigenvalue is theta_i + sum_j R_ji^2 / (theta_i - lambda_j), and the power step states
        theta_i + sum_j R_ji^2 / theta_i: the difference is lambda_j / theta_i times the former.

        Args:
            values: theta, of the block and the look beside it (c,).
            squares: of the lengths of their residuals, (c,).
            b: vectors in the block; only what is outside of it makes them wrong.
            dtype: of the products.
        """
        known, squares = values[: self.k], squares[: self.k].clamp(min=0)
        tiny = torch.finfo(values.dtype).tiny
        rounding = ROUNDING * torch.finfo(dtype).eps * float(values[0].abs())
        if b == len(values):
            return (rounding,) * self.k
        off = torch.minimum(squares / (known - values[b]).clamp(min=tiny), squares.sqrt())
        if self._bare is None:
            off = off * values[b].clamp(min=0) / known.clamp(min=tiny)
        return tuple((off + rounding).tolist())

    def _outside(self, run: int, image: Tensor | None) -> Tensor | None:
        """The part of a vector (P,) outside of a run's block, as a unit vector."""
        if image is None:
            return None
        block = self._current().block
        block = block if block.dim() == 2 else block[run]
        image = reject(block, image)
        length = norm(image)
        return image / length if length > 0 else None

    def _with_looks(self, block: Tensor) -> Tensor:
        """Blocks with one more row, the look of each run at what lies below."""
        blocks = block[None] if block.dim() == 2 else block
        looks = [e.start(b, self._generator) for e, b in zip(self._edges, blocks, strict=True)]
        if any(look is None for look in looks):
            return block
        beside = torch.stack([look for look in looks if look is not None])[:, None]
        return torch.cat([blocks, beside], dim=1).reshape(*block.shape[:-2], -1, block.shape[-1])

    def _look(self, costs: list[float]) -> bool:
        """See to lambda_{b+1} between renewals: whether one has to follow."""
        if any(edge.age >= LOOK_EVERY for edge in self._edges):
            block = self._current().block
            rows = self._with_looks(block)[..., block.shape[-2] :, :]
            if rows.shape[-2]:
                images = self._multiply(rows)
                self._spend(costs, 1)
                for run, edge in enumerate(self._edges):
                    look, image = (x.reshape(-1, x.shape[-1])[run] for x in (rows, images))
                    edge.look(float(dot(look, image)), self._outside(run, image))
            else:
                for edge in self._edges:
                    edge.age = 0
        room = self.follows_guards and self._guards < MOST_GUARDS
        return any(
            edge.narrowed(self._last(run), NARROW if room else 1.0)
            for run, edge in enumerate(self._edges)
        )

    def _look_thoroughly(self, costs: list[float]) -> bool:
        """Search the complement of the blocks where that is due: whether there was more in it."""
        more = False
        for run, edge in enumerate(self._edges):
            edge.renewals += 1
            if not self.gap_every or edge.renewals % self.gap_every or edge.vector is None:
                continue
            block = self._current().block
            block = block if block.dim() == 2 else block[run]
            lead, last = float(self._spectrum(run)[0]), self._last(run)
            found = next_eigenpair(self._operator(run), block, lead, edge.vector)
            costs[run] += PRODUCT_COST * found.num_matvecs
            missed = found.value > MORE * max(edge.value, 0.0)
            more |= missed and found.value > (WIDE if self.follows_guards else 1.0) * last
            if found.value > edge.value:
                edge.value, edge.vector = found.value, found.vector
                edge.reached = max(edge.reached, found.value)
        return more

    def _last(self, run: int) -> float:
        """lambda_k of a run."""
        return float(self._spectrum(run)[self.k - 1])

    def _is_negative(self) -> bool:
        """Whether some lambda_k is below zero: no power step leads there."""
        spectra = [self._spectrum(run) for run in range(len(self._edges))]
        return any(float(s[self.k - 1]) < -VANISHED * abs(float(s[0])) for s in spectra)

    def _was_cut(self) -> bool:
        """Whether the budget ended the last solve."""
        return self._bare is not None and math.inf in self._bare

    def _parts(self, vector: Tensor, costs: list[float]) -> list[tuple[float, float]]:
        """Sampling error and bias of each run's P_k v at the last power step."""
        if self._bare is not None:
            return [(angle, 0.0) for angle in self._bare]
        measured = self._measures()
        self._last_seen = self._seen(vector, measured=measured)
        if measured:
            self._spend(costs, self._content_part)
            self._contents = [each.content for each in self._last_seen]
        parts = self._parts_seen()
        self._biased = max(bias for _, bias in parts)
        return parts

    def _parts_seen(self) -> list[tuple[float, float]]:
        """Both of each run, with what is known by now; a step by all samples says what it left."""
        parts = [self._both(run, each) for run, each in enumerate(self._last_seen)]
        for edge, (_, left) in zip(self._edges, parts, strict=True):
            edge.left = edge.left if math.isnan(edge.reached) else left
        return parts

    def _measures(self) -> bool:
        """Whether a product shows what is left of this step: where it matters, and now and then."""
        seldom = (
            self._fresh is None and self.policy.age >= SETTLED and self._biased < SMALL * self.error
        )
        return not (seldom and self.policy.age % MEASURE_EVERY)

    def _both(self, run: int, seen: Seen, share: float = 1.0) -> tuple[float, float]:
        """Sampling error and bias of one run's P_k v.

        Args:
            run: which.
            seen: what the last power step shows.
            share: what part counts of the bias that the last step by all samples left.
        """
        spectrum, edge = self._spectrum(run), self._edges[run]
        last = float(spectrum[self.k - 1])
        if not last > VANISHED * abs(float(spectrum[0])):
            return 1.0, 0.0
        if not math.isnan(edge.reached):
            return seen.sampling, bias(seen.content, seen.moved, edge.reached / last)
        turned = bias(seen.content, seen.moved, edge.ratio(last))
        return seen.sampling, max(turned, share * edge.left)

    def _stated(self) -> list[float]:
        """The errors last estimated, with what is known of lambda_{b+1} by now."""
        if self._bare is not None:
            return [total(angle, 0.0) for angle in self._bare]
        return [total(*parts) for parts in self._parts_seen()]

    def _estimate(self, vector: Tensor, costs: list[float]) -> list[float]:
        """Estimated errors of P_k v of each run, relative to norm(v)."""
        return [total(*parts) for parts in self._parts(vector, costs)]

    def _wrong(self, errors: Sequence[float]) -> list[int]:
        """Runs whose basis is too wrong, or has turned too far to say how wrong it is.

        Where the gap is closed, no cost would help; but of a basis that has turned too far it is
        not known whether it is.
        """
        turns = self._turns()
        return [
            run
            for run, (error, turned) in enumerate(zip(errors, turns, strict=True))
            if turned > FAR or not (error <= self.error or self._gap(run).closed)
        ]

    def _turns(self) -> list[float]:
        if self._current().stale is None:
            return [0.0] * len(self._edges)
        return turn(self._current()).reshape(-1).tolist()

    def _affords(self, costs: Sequence[float], more: float) -> bool:
        return math.isnan(more) or max(costs) + more <= self.budget

    def _spend(self, costs: list[float], products: float) -> None:
        for run in range(len(costs)):
            costs[run] += PRODUCT_COST * products

    def _gap(self, run: int) -> Gap:
        """How clearly a run's lambda_k stands above lambda_{k+1}."""
        known, edge = self._spectrum(run), self._edges[run]
        last = float(known[self.k - 1])
        below = edge.ratio(last) * last if math.isfinite(edge.value) else math.nan
        if len(known) > self.k and not float(known[self.k]) < below:
            below = float(known[self.k])
        return Gap(known[: self.k], below)

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
        """State how the update went, and warn of what has become wrong with it."""
        known = [None] * len(errors) if checked is None else checked
        uncertain = self._eigenvalue_errors()
        reports = []
        for run, (error, cost, check) in enumerate(zip(errors, costs, known, strict=True)):
            gap, met = self._gap(run), error <= self.error
            before = self.reports[run] if self.reports else None
            if gap.closed and not (before and before.ill_defined):
                gap.warn(stacklevel=4)
            if not (met or gap.closed) and (before is None or before.target_met):
                warnings.warn(
                    f"the subspace of dimension {self.k} is {self._missed(error, gap)}",
                    TargetMissed,
                    stacklevel=4,
                )
            reports.append(
                TrackerReport(
                    error,
                    cost,
                    renewed,
                    subset,
                    age,
                    check,
                    gap.below,
                    ill_defined=gap.closed,
                    target_met=met,
                    eigenvalue_errors=uncertain[run],
                    caveat=gap.caveat() or ("" if met else self._missed(error, gap)),
                )
            )
        self.reports = reports

    def _missed(self, error: float, gap: Gap) -> str:
        if self._was_cut():
            return (
                f"of an unknown error: the budget of {self.budget:g} gradients ended its solve;"
                " raise budget="
            )
        return (
            f"off by about {100 * error:.2g} % of the vector, more than the target of"
            f" {100 * self.error:.2g} %: lambda_{self.k} = {gap.last:.4g}, lambda_{self.k + 1} ="
            f" {gap.below:.4g}{gap.hint()}"
        )

    def _keep(self) -> None:
        """The update changed nothing: what is known of it becomes older."""
        self.reports = [
            replace(
                report,
                error=math.nan,
                subspace_cost=0.0,
                renewed=False,
                subset=0,
                age=report.age + 1,
                checked_error=None,
            )
            for report in self.reports
        ]

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue bit for bit: bases as rows, so that their layout stays."""
        return {
            "generator": self._generator.get_state(),
            "reports": [vars(report).copy() for report in self.reports],
            "edges": [edge.state_dict() for edge in self._edges],
            "escalation": self._escalation.state_dict(),
            "solve_cost": self._solve_cost,
            "bare": self._bare,
            "contents": self._contents,
            "biased": self._biased,
            "step": None if self._step is None else vars(self._step).copy(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave, the way to multiply by the Hessian included."""
        self._generator.set_state(state["generator"].cpu())
        self.reports = [TrackerReport.from_state(report) for report in state["reports"]]
        for edge, saved in zip(self._edges, state["edges"], strict=True):
            edge.load_state_dict(saved)
        self._escalation = Escalation(**state["escalation"])
        self._solve_cost, self._bare = state["solve_cost"], state["bare"]
        self._contents, self._biased = state["contents"], state["biased"]
