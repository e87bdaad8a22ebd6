"""Figure 1a of the paper, its branches and seeds one after another or in lockstep: what is faster?

SGD, Dom-SGD and Bulk-SGD from one checkpoint with the same mini-batches, the dominant subspace
followed at every step of each branch, for one seed or several. One after another: a
`SubspaceTracker` with `SplitUpdate` for each run. In lockstep: one `LockstepSGD` for all runs. Both
take turns of a few steps in one process, so that what else the machine does falls on both alike;
the first steps are not timed: they solve for the subspaces, settle subset and renewals, and record
what `--replay` replays. Time is that of one step of all runs together, mini-batches and updates
included: on one thread of a CPU the processor's, otherwise that of the clock.

    error      median and 95 % quantile of the trackers' own estimates
    counted    gradients of the full loss that tracking counts, a step and run
    loss       of all training samples at the end, mean over seeds; that of both ways must agree

Every problem's learning rate, and the steps before the branches, are those of its spec. With
`--figure` the loss of all samples and the alignment of its gradient are drawn for the runs in
lockstep, a point for every 100 steps, and their CSV is put beside the PNG; what these points take
is in the time of the whole, not in that of a step.

    python benchmarks/figure_1a.py digits --seeds 3
    python benchmarks/figure_1a.py digits --replay --figure digits.png
    python benchmarks/figure_1a.py mnist --data-dir DIR --device cuda --chunk-size 16384 --replay \
        --steps 18000 --lockstep-only --figure figure-1a.png

Source of the figure: Song, Ahn, Yun 2025 (arXiv 2405.16002): 20,000 steps on MNIST-5k, of which the
branches take those after the first 2,000.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure as Canvas
from torch import Tensor

from thalweg.analysis.figures.drawing import PAGE_WIDTH, STYLE
from thalweg.lab.config import PROBLEM_SPECS, load_spec
from thalweg.lab.training.step import minibatch
from thalweg.loss.lockstep_objective import LockstepObjective
from thalweg.loss.objective import Objective
from thalweg.measure.clock import now
from thalweg.optim.lockstep_sgd import LockstepSGD
from thalweg.optim.split import SplitUpdate
from thalweg.problems import Problem, build_problem
from thalweg.tracking.lockstep_tracker import LockstepTracker
from thalweg.tracking.source import TrackerReport
from thalweg.tracking.tracker import SubspaceTracker

BRANCHES = {"SGD": (1.0, 1.0), "Dom-SGD": (1.0, 0.0), "Bulk-SGD": (0.0, 1.0)}
COLOURS = {"SGD": "#222222", "Dom-SGD": "#d55e00", "Bulk-SGD": "#0072b2"}
BATCH_SIZE, TURN, RECORD_EVERY = 50, 10, 100


@dataclass(frozen=True)
class Figure:
    """What both ways compute: one problem, several seeds, from the end of each seed's trunk."""

    problem: Problem
    objective: Objective
    k: int
    lr: float
    seeds: Sequence[int]
    trunk: int
    replay: bool
    beginnings: Tensor

    def batches(self, step: int) -> list[Tensor]:
        """Each seed's mini-batch of a step, (b,) on the CPU."""
        size = self.problem.num_samples
        return [minibatch(seed, step, BATCH_SIZE, size) for seed in self.seeds]


class Way(Protocol):
    """One of the two ways: steps of all runs, a seed's three branches after another."""

    def step(self, step: int) -> list[TrackerReport]:
        """One step of all runs, and what tracking says of it."""
        ...

    def thetas(self) -> Tensor:
        """Where the runs are, (R, P)."""
        ...


class OneAfterAnother:
    """A model, an optimizer and a tracker for each run."""

    def __init__(self, figure: Figure) -> None:
        self.figure = figure
        self.runs: list[SplitUpdate] = []
        self.models = []
        for beginning in figure.beginnings:
            for factors in BRANCHES.values():
                model = copy.deepcopy(figure.problem.model)
                objective = Objective(model, figure.problem.loss, figure.problem.train)
                objective.layout.write(model, beginning)
                base = torch.optim.SGD(model.parameters(), figure.lr)
                self.runs.append(SplitUpdate(base, SubspaceTracker(objective, figure.k), *factors))
                self.models.append(model)

    def step(self, step: int) -> list[TrackerReport]:
        inputs, targets = self.figure.problem.train
        chosen = [batch for batch in self.figure.batches(step) for _ in BRANCHES]
        for run, model, batch in zip(self.runs, self.models, chosen, strict=True):
            model.zero_grad()
            self.figure.problem.loss(model(inputs[batch]), targets[batch]).backward()
            if (run.dominant, run.bulk) == BRANCHES["SGD"]:
                # Plain SGD asks for no subspace: the figure does.
                parts = [p.grad for p in model.parameters() if p.grad is not None]
                run.source.update(vector=self.figure.objective.layout.flatten(parts))
            run.step()
        return [run.source.report for run in self.runs]

    def thetas(self) -> Tensor:
        return torch.stack([self.figure.objective.layout.read(model) for model in self.models])


class InLockstep:
    """One computation for all runs."""

    def __init__(self, figure: Figure) -> None:
        self.figure = figure
        self.objective = LockstepObjective(figure.objective, replay=figure.replay)
        self.points: list[pd.DataFrame] = []
        dominant, bulk = zip(*BRANCHES.values(), strict=True)
        seeds = len(figure.seeds)
        self.sgd = LockstepSGD(
            LockstepTracker(self.objective, figure.k),
            figure.beginnings.repeat_interleave(len(BRANCHES), 0),
            figure.lr,
            dominant * seeds,
            bulk * seeds,
        )

    def step(self, step: int) -> list[TrackerReport]:
        self.last = step, self.sgd.thetas
        batches = torch.stack(self.figure.batches(step))
        self.sgd.step(batches.repeat_interleave(len(BRANCHES), 0))
        return self.sgd.tracker.reports

    def thetas(self) -> Tensor:
        return self.sgd.thetas

    def record(self) -> None:
        """Loss of all samples, and alignment of its gradient, where the subspace was last taken."""
        step, thetas = self.last
        losses, gradients = self.objective.values_and_gradients(thetas)
        inside = self.sgd.tracker.project(gradients).norm(dim=1) / gradients.norm(dim=1)
        runs = [(step, seed, branch) for seed in self.figure.seeds for branch in BRANCHES]
        point = pd.DataFrame(runs, columns=["step", "seed", "branch"])
        self.points.append(point.assign(loss=losses.tolist(), alignment=inside.tolist()))


WAYS: dict[str, Callable[[Figure], Way]] = {
    "one after another": OneAfterAnother,
    "in lockstep": InLockstep,
}


@dataclass
class Measured:
    """Seconds of all timed steps, and what the trackers reported at them."""

    way: Way
    seconds: float = 0.0
    steps: int = 0
    reports: list[TrackerReport] = field(default_factory=list)

    def turn(self, steps: range, device: torch.device, *, timed: bool) -> None:
        alone = device.type == "cpu" and torch.get_num_threads() == 1
        clock = time.process_time if alone else partial(now, device)
        begin = clock()
        reports = [report for step in steps for report in self.way.step(step)]
        if timed:
            self.seconds += clock() - begin
            self.steps += len(steps)
            self.reports += reports

    @property
    def pace(self) -> float:
        """Seconds of a step of all runs."""
        return self.seconds / self.steps


def prepare(options: argparse.Namespace) -> Figure:
    """Build the problem, and train each seed's trunk: in lockstep as well."""
    words = [] if options.data_dir is None else ["--problem.data.data_dir", options.data_dir]
    spec = load_spec(PROBLEM_SPECS[options.problem], words)
    (phase,) = spec.phases
    lr = options.lr or phase.optimizer.lr
    trunk = options.trunk if options.trunk is not None else phase.steps or 0
    seeds = range(options.seeds)
    problems = [build_problem(spec.problem, seed, device=options.device) for seed in seeds]
    problem = problems[0]
    k = problem.num_classes or 10
    chunk_size = options.chunk_size
    objective = Objective(problem.model, problem.loss, problem.train, chunk_size=chunk_size)
    thetas = torch.stack([objective.layout.read(p.model) for p in problems])
    runs = LockstepObjective(objective, replay=options.replay)
    for step in range(trunk):
        batches = [minibatch(seed, step, BATCH_SIZE, problem.num_samples) for seed in seeds]
        thetas = thetas - lr * runs.values_and_gradients(thetas, torch.stack(batches))[1]
    return Figure(problem, objective, k, lr, seeds, trunk, options.replay, thetas)


def measure(
    figure: Figure, ways: Sequence[Measured], steps: int, settle: int, *, record: bool = False
) -> None:
    """Let the ways take turns; `record` what is drawn of the runs in lockstep."""
    for begin in range(0, steps, TURN):
        turn = range(figure.trunk + begin, figure.trunk + min(begin + TURN, steps))
        for measured in ways:
            measured.turn(turn, figure.objective.device, timed=begin >= settle)
            due = record and (turn.stop - figure.trunk) % RECORD_EVERY == 0
            if due and isinstance(measured.way, InLockstep):
                measured.way.record()


def report(figure: Figure, name: str, measured: Measured) -> None:
    """One way's line, and its branches' losses."""
    errors = [r.error for r in measured.reports]
    counted = np.mean([r.subspace_cost for r in measured.reports])
    losses = [float(figure.objective.value(theta)) for theta in measured.way.thetas()]
    by_branch = np.reshape(losses, (-1, len(BRANCHES))).mean(axis=0)
    print(
        f"{name:18} {1e3 * measured.pace:9.2f} ms   error {np.median(errors):.2%}"
        f" / {np.quantile(errors, 0.95):.2%}   counted {counted:.2f}   loss "
        + "  ".join(f"{b} {v:.4f}" for b, v in zip(BRANCHES, by_branch, strict=True))
    )


def draw(table: pd.DataFrame, path: Path) -> None:
    """A line for each run over steps; the table is put beside the figure."""
    table.to_csv(path.with_suffix(".csv"), index=False)
    with rc_context(dict[Any, Any](STYLE)):
        canvas = Canvas(figsize=(PAGE_WIDTH, 0.36 * PAGE_WIDTH), layout="constrained")
        losses, alignments = canvas.subplots(1, 2)
        for branch, colour in COLOURS.items():
            for seed, run in table[table["branch"] == branch].groupby("seed"):
                label = None if seed else branch
                losses.plot(run["step"], run["loss"], color=colour, lw=0.9, label=label)
                alignments.plot(run["step"], run["alignment"], color=colour, lw=0.9)
        losses.set(xlabel="step", ylabel="loss of all training samples", yscale="log")
        losses.legend(frameon=False)
        alignments.set(xlabel="step", ylabel=r"alignment of the gradient, $\chi_k$", ylim=(0, 1))
        canvas.savefig(path)


def main() -> None:
    options, begin = _options(), time.perf_counter()
    torch.set_num_threads(options.threads)
    figure = prepare(options)
    runs = len(BRANCHES) * options.seeds
    print(
        f"{options.problem}, P = {figure.objective.num_parameters},"
        f" N = {figure.objective.num_samples}, lr {figure.lr:g}, {runs} runs"
        f" of {options.steps} steps after {figure.trunk}, the first {options.settle} not timed;"
        f" {figure.objective.device},"
        f" {torch.get_num_threads()} thread(s)"
    )
    names = ["in lockstep"] if options.lockstep_only else list(WAYS)
    ways = {name: Measured(WAYS[name](figure)) for name in names}
    record = options.figure is not None
    measure(figure, list(ways.values()), options.steps, options.settle, record=record)
    print("a step of all runs:")
    for name, measured in ways.items():
        report(figure, name, measured)
    pace = ways["in lockstep"].pace
    if not options.lockstep_only:
        print(f"ratio {ways['one after another'].pace / pace:.2f}")
    whole = time.perf_counter() - begin
    print(f"20,000 steps in lockstep at this pace: {20_000 * pace / 60:.1f} minutes")
    print(f"all of the above, steps before the branches included: {whole / 60:.1f} minutes")
    way = ways["in lockstep"].way
    if options.figure and isinstance(way, InLockstep):
        draw(pd.concat(way.points), options.figure)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("problem", choices=list(PROBLEM_SPECS))
    parser.add_argument("--data-dir")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=300, help="of the branches")
    parser.add_argument("--settle", type=int, default=100, help="of these not timed")
    parser.add_argument("--seeds", type=int, default=1, help="three runs each")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--trunk", type=int, help="steps before the branches")
    parser.add_argument("--chunk-size", type=int, default=1024, help="samples at once, in lockstep")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--replay", action="store_true", help="record in lockstep, and replay")
    parser.add_argument("--lockstep-only", action="store_true")
    parser.add_argument("--figure", type=Path, help="a PNG; a CSV of its points is put beside it")
    options = parser.parse_args()
    # Whole turns are timed, or not.
    options.settle = -(-options.settle // TURN) * TURN
    if options.steps <= options.settle:
        parser.error("--steps must be more than --settle")
    if options.figure and options.steps < RECORD_EVERY:
        parser.error(f"--figure needs --steps of {RECORD_EVERY} or more")
    return options


if __name__ == "__main__":
    main()
