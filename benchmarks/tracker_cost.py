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
    python benchmarks/tracker_cost.py digits --quick --figure quick.png     # a minute, to try it
    python benchmarks/tracker_cost.py digits --saved quick.csv --figure again.png   # draw alone
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from thalweg.spectrum.gap import GapClosed
from thalweg.tracking import refresh_policy
from tracking.changes import CHANGES, CLOCK_ONLY, ESTIMATE_ONLY, Setting, Unchanged
from tracking.comparison import Row, load, of_change, relative_costs, save
from tracking.drawing import draw
from tracking.recording import Replay, Stretch, record


@dataclass(frozen=True)
class Plan:
    """The grid by clock, the targets by estimate, and where each change is made."""

    shares: tuple[float, ...]
    periods: tuple[int, ...]
    targets: tuple[float, ...]
    bases: tuple[Setting, ...]

    def variants(self, changes: list[str] | None) -> Iterator[tuple[str, Setting]]:
        """Each change, and the setting it is made at."""
        for share in self.shares:
            yield from (("by clock", Setting(share=share, period=p)) for p in self.periods)
        yield from (("by estimate", Setting(target)) for target in self.targets)
        for change in CHANGES if changes is None else changes:
            for base in self.bases:
                if change not in (ESTIMATE_ONLY if base.period else CLOCK_ONLY):
                    yield change, base


FULL = Plan(
    shares=(0.01, 0.02, 0.04, 0.08, 0.16),
    periods=(5, 10, 20, 40, 80),
    targets=(0.003, 0.005, 0.01, 0.02, 0.04),
    bases=(
        *(Setting(share=s, period=p) for s, p in [(0.02, 40), (0.04, 20), (0.08, 10)]),
        *(Setting(target) for target in (0.005, 0.01, 0.02)),
    ),
)
QUICK = Plan(
    shares=(0.01, 0.04, 0.16),
    periods=(2, 8, 16),
    targets=(0.005, 0.02),
    bases=(Setting(share=0.04, period=8), Setting(0.005)),
)
# Steps before the stretch, in it, of these not looked at, and from one truth to the next: 3, which
# no period is a multiple of, or it would meet renewals alone.
LENGTHS = {"digits": (500, 300, 60, 3), "mnist": (500, 120, 40, 3), "quick": (300, 30, 9, 3)}


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    rows = load(options.saved) if options.saved else measured(options)
    if options.figure and not options.saved:
        # The figure is one of what was saved, to the last digit.
        save(rows, options.figure.with_suffix(".csv"))
        rows = load(options.figure.with_suffix(".csv"))
    print("\nrelative cost at equal error")
    for change in dict.fromkeys(row.change for row in rows):
        print(f"{change:14}", *(_in_words(rows, change, by_clock) for by_clock in (True, False)))
    if options.figure:
        draw(rows, options.figure)


def measured(options: argparse.Namespace) -> list[Row]:
    """Every variant's row, said as it comes."""
    warm_up, steps, settle, check = LENGTHS["quick" if options.quick else options.problem]
    stretch = Stretch(
        problem=options.problem,
        data_dir=options.data_dir,
        lr=options.lr,
        warm_up=warm_up if options.warm_up is None else options.warm_up,
        steps=options.steps or steps,
        settle=options.settle or settle,
        check=check,
        seed=options.seed,
    )
    replay, plan = record(stretch), QUICK if options.quick else FULL
    rows = []
    print(f"{'':14} {'':18} {'error of P_k g':>15} {'gradients a step':>18}")
    print(f"{'change':14} {'setting':18} {'median':>7} {'95 %':>7} {'counted':>9} {'measured':>8}")
    for change, setting in plan.variants(options.changes):
        row = run(replay, change, setting, options.seeds)
        rows.append(row)
        print(
            f"{change:14} {row.setting:18} {row.median:7.2%} {row.error:7.2%} {row.counted:9.2f}"
            f" {row.measured:8.2f}   renewed {row.renewed:.1%}",
            flush=True,
        )
    return relative_costs(rows)


def run(replay: Replay, change: str, setting: Setting, seeds: int) -> Row:
    """Replay one variant, once for each seed."""
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
                if step < replay.stretch.settle:
                    continue
                counted.append(follow.report.subspace_cost)
                measured.append(spent / seconds)
                renewed.append(follow.report.renewed)
                if step in replay.truth:
                    wrong = follow.dominant(vector).double() - replay.truth[step]
                    errors.append(float(wrong.norm() / vector.norm()))
    return Row(
        str(replay.stretch),
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
    before, refresh_policy.SECOND_STEP = refresh_policy.SECOND_STEP, share
    try:
        yield
    finally:
        refresh_policy.SECOND_STEP = before


def seconds_of_a_gradient(replay: Replay) -> float:
    each = []
    for _ in range(5):
        begin = time.perf_counter()
        replay.objective.gradient(replay.thetas[0])
        each.append(time.perf_counter() - begin)
    return statistics.median(each)


def _in_words(rows: list[Row], change: str, by_clock: bool) -> str:
    cost = of_change(rows, change, by_clock)
    where = "by clock" if by_clock else "by estimate"
    return " " * 20 if math.isnan(cost) else f"{where:>12} {cost:5.2f}  "


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("problem", choices=["digits", "mnist"])
    parser.add_argument("--data-dir")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--warm-up", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--settle", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=1, help="of the subsets, pooled")
    parser.add_argument("--changes", nargs="*", choices=list(CHANGES))
    parser.add_argument("--quick", action="store_true", help="few settings and steps: a minute")
    parser.add_argument("--saved", type=Path, help="a CSV of an earlier run, to draw alone")
    parser.add_argument("--figure", type=Path, help="a PNG; a CSV of the table is put beside it")
    return parser.parse_args()


if __name__ == "__main__":
    warnings.simplefilter("ignore", GapClosed)
    main()
