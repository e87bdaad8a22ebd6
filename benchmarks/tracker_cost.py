"""What lowers the cost of a tracked subspace at equal error, and what does not?

One recorded stretch of training is replayed for every variant of the tracker, so that all see the
same thetas. Error is that of P_k g for the full gradient g, relative to norm(g), against S_k in
float64 from scratch (tolerance 1e-6), after `--settle` steps. Cost is counted in gradients of the
full loss and measured in them, timed in the same run; the first solve and g itself do not count.

Subset size and renewal are set by a clock (fixed: a grid of both) or by the tracker's own estimate
(a target error). Each change is made at some settings of either kind:

    stratified       halves of the subset in which every class has its share
    kept subset      one subset for the whole run, in place of a new one at each renewal
    2, 5 guards      so many rows more than k are followed, the first k used
    in time          what the subset misses, extrapolated linearly from the last two references
    third, 1, 3      its derivative along the top 1 or 3 eigenvectors, by a forward difference
    bfloat16         forward pass of the small products in bfloat16
    no estimate      without the products that estimate the error
    one, two steps   never, or always, a second power step
    in parts         at a renewal all samples are summed from the halves of the subset and the rest
    gap looked at    lambda_{k+1} at every tenth renewal, as by default

The relative cost of a change is its cost over that of the unchanged tracker at equal error: both
are compared at one setting with the cost that the frontier of the grid has at their errors.

    python benchmarks/tracker_cost.py digits --seeds 3 --figure tracker-cost.png
    python benchmarks/tracker_cost.py mnist --data-dir DIR
"""

from __future__ import annotations

import argparse
import copy
import csv
import hashlib
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from thalweg.curvature import Hessian, Objective, SubspaceTracker, top_eigenpairs, tracker
from thalweg.curvature.gap import GapClosed
from thalweg.curvature.operators import PRODUCT_COST
from thalweg.curvature.power_step import power_step
from thalweg.curvature.reference import Reference
from thalweg.curvature.renewal import RenewalPolicy
from thalweg.lab.minibatches import minibatch
from thalweg.lab.problems import build_problem
from thalweg.lab.spec import load_spec

K = 10
FIRST_ONLY = 10**9
SHARES, PERIODS = [0.01, 0.02, 0.04, 0.08, 0.16], [5, 10, 20, 40, 80]
TARGETS = [0.003, 0.005, 0.01, 0.02, 0.04]


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


@dataclass
class Replay:
    """A stretch of training: thetas, full gradients, and P_k g in float64 at some steps."""

    objective: Objective
    labels: Tensor
    thetas: list[Tensor]
    gradients: list[Tensor]
    truth: dict[int, Tensor]
    settle: int


@dataclass(frozen=True)
class Row:
    """What one variant reached at one setting, over all seeds."""

    change: str
    setting: str
    by_clock: bool
    median: float
    error: float
    counted: float
    measured: float
    renewed: float
    relative_cost: float = math.nan


class Clock(RenewalPolicy):
    """Subset size and period stay."""

    def plan(self) -> None:
        self.history = []


class Unchanged(SubspaceTracker):
    """The tracker as it is, but that it looks at the gap once only."""

    guards = 0
    gap_looks = FIRST_ONLY
    second_step = tracker.SECOND_STEP

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
            size, N = 2 * round(setting.share * replay.objective.num_samples / 2), self.num_samples
            self._anchors._first_policy = Clock(N, math.inf, subset=size, period=setting.period)

    @property
    def num_samples(self) -> int:
        return self.objective.num_samples

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
        self.low = copy.copy(replay.objective)
        self.low.forward_dtype = torch.bfloat16
        self.low.products = copy.deepcopy(replay.objective.products)
        self.operator = self._operator

    def _operator(self, objective, theta=None, samples=None, *, keep_graph=False) -> Hessian:
        objective = objective if samples is None else self.low
        return Hessian(objective, theta, samples, keep_graph=keep_graph)


class Kept(Unchanged):
    """The subset is drawn in one order for the whole run, a larger one with the smaller in it."""

    def _renew(self) -> float:
        self._generator.manual_seed(self.seed)
        return super()._renew()


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

    def _renew(self) -> float:
        policy, rows = self._anchors.plan(), self._current().rows
        whole, sampled, half, subset, touched = self.products(rows, policy.subset)
        reference = Reference(rows, whole - sampled, whole - half, subset)
        assert self._theta is not None
        self._anchors.renew(reference, self._theta, policy)
        self._step = power_step(rows, whole, self.k)
        self._half, self._seen_from = None, reference
        return PRODUCT_COST * self.k * touched / self.num_samples + self._look_at_gap()


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

    def _bias(self, vector: Tensor) -> float:
        return 0.0

    def _errors(self, vector: Tensor) -> tuple[float, float]:
        return 0.0, 0.0

    def update(self, theta: Tensor | None = None, vector: Tensor | None = None):
        result = super().update(theta, vector)
        saved = PRODUCT_COST * self.report.subset / self.num_samples
        self.report = replace(self.report, gradients=self.report.gradients - saved)
        return result


class Advanced(Unchanged):
    """What the subset misses (offset) changes linearly with coordinates of the step's theta."""

    def __init__(self, replay: Replay, setting: Setting, seed: int) -> None:
        super().__init__(replay, setting, seed)
        self.slopes: list[tuple[Tensor, Tensor]] = []

    def coordinates(self) -> list[float]:
        raise NotImplementedError

    def _power_step(self, reference: Reference) -> Tensor | None:
        offset, first = reference.offset, reference.offset_first
        for coordinate, slopes in zip(self.coordinates(), self.slopes, strict=True):
            offset = offset + coordinate * slopes[0]
            first = first + coordinate * slopes[1]
        return super()._power_step(replace(reference, offset=offset, offset_first=first))


class InTime(Advanced, Kept):
    """The subset must be kept: the change of its offset is known from two references then."""

    def coordinates(self) -> list[float]:
        return [len(self.policy.history) + 1.0] * len(self.slopes)

    def _renew(self) -> float:
        age, before = (
            len(self.policy.history),
            self._anchors.reference if self._anchors._all else None,
        )
        cost = super()._renew()
        if before is not None:
            new = self._anchors.reference
            old = before.turned(new.rows)
            changes = new.offset - old.offset, new.offset_first - old.offset_first
            self.slopes = [(changes[0] / age, changes[1] / age)]
        return cost


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

    def _renew(self) -> float:
        cost = super()._renew()
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
        return cost


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
BASES = [Setting(share=s, period=p) for s, p in [(0.02, 40), (0.04, 20), (0.08, 10)]]
BASES += [Setting(target) for target in (0.005, 0.01, 0.02)]


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    replay = record(options)
    rows = []
    print(f"{'':14} {'':18} {'error of P_k g':>15} {'gradients a step':>18}")
    print(f"{'change':14} {'setting':18} {'median':>7} {'95 %':>7} {'counted':>9} {'measured':>8}")
    for change, setting in variants(options.changes):
        rows.append(run(replay, change, setting, options.seeds))
        row = rows[-1]
        print(
            f"{change:14} {row.setting:18} {row.median:7.2%} {row.error:7.2%} {row.counted:9.2f}"
            f" {row.measured:8.2f}   renewed {row.renewed:.1%}",
            flush=True,
        )
    rows = relative_costs(rows)
    print("\nrelative cost at equal error")
    for change in dict.fromkeys(row.change for row in rows):
        print(f"{change:14}", *(_in_words(rows, change, by_clock) for by_clock in (True, False)))
    if options.figure:
        save(rows, options.figure)
        draw(rows, options)


def variants(changes: list[str] | None) -> Iterator[tuple[str, Setting]]:
    for share in SHARES:
        yield from (("by clock", Setting(share=share, period=period)) for period in PERIODS)
    yield from (("by estimate", Setting(target)) for target in TARGETS)
    for change in CHANGES if changes is None else changes:
        for base in BASES:
            if change not in (ESTIMATE_ONLY if base.period else CLOCK_ONLY):
                yield change, base


def record(options: argparse.Namespace) -> Replay:
    """Train, keep thetas and full gradients, and solve for the truth at every n-th of them."""
    words = [] if options.data_dir is None else ["--problem.data.data_dir", options.data_dir]
    spec = load_spec("digits" if options.problem == "digits" else "mnist-mlp", words)
    problem = build_problem(spec.problem, options.seed)
    model, (inputs, targets) = problem.model, problem.train
    objective = Objective(model, problem.loss, problem.train)
    base = torch.optim.SGD(model.parameters(), options.lr)
    thetas = []
    for step in range(options.warm_up + options.steps):
        if step >= options.warm_up:
            thetas.append(objective.theta())
        chosen = minibatch(options.seed, step, 50, problem.num_samples)
        base.zero_grad()
        problem.loss(model(inputs[chosen]), targets[chosen]).backward()
        base.step()
    gradients = [objective.gradient(theta) for theta in thetas]
    exact = Objective(
        copy.deepcopy(model).double(), problem.loss, (inputs.double(), _double(targets))
    )
    checked = {s: (thetas[s], gradients[s]) for s in range(options.settle, options.steps, 3)}
    labels = targets if targets.dim() == 1 else targets.argmax(dim=1)
    return Replay(objective, labels, thetas, gradients, truth(exact, checked), options.settle)


def truth(exact: Objective, checked: dict[int, tuple[Tensor, Tensor]]) -> dict[int, Tensor]:
    """P_k g in float64 at each theta, solved once: a temporary file keeps it."""
    digest = hashlib.sha256()
    for theta, _ in checked.values():
        digest.update(theta.numpy().tobytes())
    path = Path(tempfile.gettempdir()) / f"thalweg-truth-{digest.hexdigest()[:16]}.npz"
    if path.exists():
        with np.load(path) as saved:
            return {int(step): torch.from_numpy(saved[step]) for step in saved.files}
    found = {}
    for step, (theta, gradient) in checked.items():
        hessian = Hessian(exact, theta.double(), keep_graph=True)
        space = top_eigenpairs(hessian, K, tolerance=1e-6, check_repeated=0)
        found[step] = space.project(gradient.double())
    np.savez(path, **{str(step): vector.numpy() for step, vector in found.items()})
    return found


def run(replay: Replay, change: str, setting: Setting, seeds: int) -> Row:
    errors, counted, measured, renewed = [], [], [], []
    for seed in range(seeds):
        follow = CHANGES.get(change, Unchanged)(replay, setting, seed)
        seconds = seconds_of_a_gradient(replay)
        with second_step_at(follow.second_step):
            for step, (theta, vector) in enumerate(
                zip(replay.thetas, replay.gradients, strict=True)
            ):
                begin = time.perf_counter()
                follow.update(theta, vector)
                spent = time.perf_counter() - begin
                if step < replay.settle:
                    continue
                counted.append(follow.report.gradients)
                measured.append(spent / seconds)
                renewed.append(follow.report.renewed)
                if step in replay.truth:
                    wrong = follow.dominant(vector).double() - replay.truth[step]
                    errors.append(float(wrong.norm() / vector.norm()))
    return Row(
        change,
        str(setting),
        bool(setting.period),
        float(np.median(errors)),
        float(np.quantile(errors, 0.95)),
        float(np.mean(counted)),
        float(np.mean(measured)),
        float(np.mean(renewed)),
    )


@contextmanager
def second_step_at(share: float) -> Iterator[None]:
    """The tracker's threshold of a second power step, for a while."""
    before, tracker.SECOND_STEP = tracker.SECOND_STEP, share
    try:
        yield
    finally:
        tracker.SECOND_STEP = before


def seconds_of_a_gradient(replay: Replay) -> float:
    each = []
    for _ in range(5):
        begin = time.perf_counter()
        replay.objective.gradient(replay.thetas[0])
        each.append(time.perf_counter() - begin)
    return statistics.median(each)


def frontier(rows: list[Row]) -> tuple[np.ndarray, np.ndarray]:
    """Errors and costs of the grid that nothing else of it undercuts in both, by error."""
    grid = sorted((row.error, row.counted) for row in rows if row.change == "by clock")
    best = [p for i, p in enumerate(grid) if all(p[1] < other[1] for other in grid[:i])]
    errors, costs = np.array(best).T
    return errors, costs


def relative_costs(rows: list[Row]) -> list[Row]:
    """Each row's cost over that of the frontier at its error; a change's over that unchanged."""
    errors, costs = frontier(rows)

    def over_frontier(row: Row) -> float:
        if not errors[0] <= row.error <= errors[-1]:
            return math.nan
        return row.counted / math.exp(np.interp(math.log(row.error), np.log(errors), np.log(costs)))

    unchanged = {r.setting: over_frontier(r) for r in rows if r.change.startswith("by ")}
    return [
        replace(
            row,
            relative_cost=over_frontier(row)
            / (1 if row.change.startswith("by ") else unchanged[row.setting]),
        )
        for row in rows
    ]


def of_change(rows: list[Row], change: str, by_clock: bool) -> float:
    """The geometric mean of a change's relative costs; NaN where there are none."""
    costs = [r.relative_cost for r in rows if r.change == change and r.by_clock == by_clock]
    costs = [cost for cost in costs if not math.isnan(cost)]
    return statistics.geometric_mean(costs) if costs else math.nan


def _in_words(rows: list[Row], change: str, by_clock: bool) -> str:
    cost = of_change(rows, change, by_clock)
    where = "by clock" if by_clock else "by estimate"
    return " " * 20 if math.isnan(cost) else f"{where:>12} {cost:5.2f}  "


def save(rows: list[Row], figure: Path) -> None:
    with figure.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(asdict(rows[0])))
        writer.writeheader()
        for row in rows:
            named = {n: f"{v:.5g}" if isinstance(v, float) else v for n, v in asdict(row).items()}
            writer.writerow(named)


def draw(rows: list[Row], options: argparse.Namespace) -> None:
    """Cost against error on the left; on the right what each change costs at equal error."""
    import matplotlib.pyplot as plt

    figure, (points, ranks) = plt.subplots(
        1, 2, figsize=(11, 5.2), width_ratios=[1.45, 1], layout="constrained"
    )
    _draw_points(points, rows)
    _draw_ranks(ranks, rows)
    points.set_title(
        f"{options.problem} MLP, SGD lr {options.lr:g}, from step {options.warm_up}", loc="left"
    )
    figure.savefig(options.figure, dpi=160)
    plt.close(figure)


# Okabe and Ito's colours, told apart by readers who are colour-blind; one for each group.
GROUPS = {
    "#0072B2": ["stratified", "kept subset"],
    "#009E73": ["2 guards", "5 guards"],
    "#D55E00": ["in time", "third, 1", "third, 3"],
    "#CC79A7": ["bfloat16"],
    "#E69F00": ["no estimate", "in parts", "gap looked at"],
    "#56B4E9": ["one step", "two steps"],
}
LOOKS = {
    name: {"color": colour, "marker": "osD"[i]}
    for colour, names in GROUPS.items()
    for i, name in enumerate(names)
}


def _draw_points(axes, rows: list[Row]) -> None:
    grid = [row for row in rows if row.change == "by clock"]
    axes.scatter(
        [100 * r.error for r in grid], [r.counted for r in grid], s=9, color="0.65", zorder=1
    )
    errors, costs = frontier(rows)
    axes.plot(100 * errors, costs, color="0.45", lw=1.4, label="best by clock (grey: the grid)")
    chosen = [row for row in rows if row.change == "by estimate"]
    axes.plot(
        [100 * r.error for r in chosen],
        [r.counted for r in chosen],
        color="black",
        marker="o",
        ms=5,
        lw=1.8,
        label="by estimate, targets " + ", ".join(f"{100 * target:g}" for target in TARGETS) + " %",
        zorder=3,
    )
    for row in rows:
        if row.change in LOOKS:
            look = LOOKS[row.change]
            face = look["color"] if row.by_clock else "white"
            axes.plot(100 * row.error, row.counted, **look, mfc=face, ms=5.5, ls="", alpha=0.9)
    axes.set(xscale="log", yscale="log")
    for axis, ticks in ((axes.xaxis, [0.1, 0.2, 0.5, 1, 2, 5, 10]), (axes.yaxis, COST_TICKS)):
        axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_ticks([], minor=True)
    axes.set_xlabel("95 % error of $P_k g$, % of norm(g)")
    axes.set_ylabel("counted gradients a step")
    axes.legend(frameon=False, loc="upper right")
    axes.grid(color="0.92")


COST_TICKS = [0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10]


def _draw_ranks(axes, rows: list[Row]) -> None:
    def rank(name: str) -> float:
        both = [of_change(rows, name, by_clock) for by_clock in (True, False)]
        return float(np.nanmean(both)) if not all(map(math.isnan, both)) else math.inf

    names = sorted({r.change for r in rows if r.change in LOOKS}, key=rank, reverse=True)
    for place, name in enumerate(names):
        for by_clock in (True, False):
            look = LOOKS[name]
            face = look["color"] if by_clock else "white"
            cost = of_change(rows, name, by_clock)
            axes.plot(cost, place, **look, mfc=face, ms=7, ls="")
    axes.axvline(1, color="0.45", lw=1)
    axes.set_yticks(range(len(names)), names)
    axes.set_xscale("log")
    ticks = [0.7, 0.8, 0.9, 1, 1.2, 1.5, 2, 3]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("cost at equal error, unchanged = 1\n(filled: by clock, open: by estimate)")
    axes.grid(color="0.92", axis="x")


def _double(targets: Tensor) -> Tensor:
    return targets.double() if targets.is_floating_point() else targets


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("problem", choices=["digits", "mnist"])
    parser.add_argument("--data-dir")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--warm-up", type=int, default=500)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--settle", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=1, help="of the subsets, pooled")
    parser.add_argument("--changes", nargs="*", choices=list(CHANGES))
    parser.add_argument("--figure", type=Path, help="a PNG; a CSV of the table is put beside it")
    options = parser.parse_args()
    options.steps = options.steps or {"digits": 300, "mnist": 120}[options.problem]
    options.settle = options.settle or {"digits": 60, "mnist": 40}[options.problem]
    return options


if __name__ == "__main__":
    warnings.simplefilter("ignore", GapClosed)
    main()
