"""The branches of a spec one by one or in lockstep: what is faster, and how far apart do they end?

Every branch of every seed is run in this process, from one trunk for both ways, as the executors
"local" and "lockstep" run them in theirs: mini-batches, updates, subspaces, probes, tables and
checkpoints included, the start of a process and the building of the problem not. On one thread of
a CPU time is the processor's, otherwise that of the clock.

    counted    gradients of the full loss that following S_k takes, a step: mean over the rows
    loss       relative difference of the full loss between both ways, the largest over the rows
    end        distance of the parameters at the end, relative to the way gone since the trunk

    python benchmarks/lockstep.py digits --seeds 1
    python benchmarks/lockstep.py digits --seeds 3 --words --dtype float64
    python benchmarks/lockstep.py mnist-mlp --words --data-dir DIR --device cuda

Source of the branches: Song, Ahn, Yun 2025 (arXiv 2405.16002), figure 1a.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from thalweg.lab.config import Spec, dump_spec, load_spec
from thalweg.lab.execution.machine import compute_repeatably, resolve_device
from thalweg.lab.execution.schedule import Task, tasks_of
from thalweg.lab.preparing import create_runs
from thalweg.lab.problem_facts import with_way_to_multiply
from thalweg.lab.sharing import this_maker
from thalweg.lab.store import StudyFolder
from thalweg.lab.training import Run
from thalweg.lab.training.lockstep import LockstepRuns
from thalweg.measure.clock import now

SMOKE = ("--steps", "60", "--phases.0.steps", "100")


@dataclass
class Way:
    """One of the two ways.

    Attributes:
        study: where it left its runs.
        seconds: of all branches.
        ends: the parameters at the end of each run, (P,).
    """

    study: StudyFolder
    seconds: float
    ends: dict[Task, Tensor]


def compare(spec: Spec, root: Path, device: str) -> tuple[Way, Way, dict[int, Tensor]]:
    """Both ways, and where each seed's trunk ends (P,)."""
    study = StudyFolder.create(root / "alone", "study", dump_spec(spec))
    tasks = tasks_of(spec)
    create_runs(study, spec, tasks, "", this_maker(device), tasks)
    begun: dict[int, Tensor] = {}
    for seed in spec.seeds:
        trunk = Run(spec, study, seed, "trunk", device=device)
        trunk.execute()
        begun[seed] = trunk.setup.objective.theta()
    shutil.copytree(root / "alone", root / "lockstep")
    together = StudyFolder(root / "lockstep" / "study")
    branches = [task for task in tasks if task.branch != "trunk"]
    alone = run_by(study, spec, branches, device, one_by_one)
    return alone, run_by(together, spec, branches, device, in_lockstep), begun


def run_by(
    study: StudyFolder,
    spec: Spec,
    tasks: Sequence[Task],
    device: str,
    way: Callable[[list[Run]], None],
) -> Way:
    """Take these runs to their ends."""
    runs = [Run(spec, study, task.seed, task.branch, device=device) for task in tasks]
    on_cpu = device == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if on_cpu else partial(now, torch.device(device))
    start = clock()
    way(runs)
    seconds = clock() - start
    ends = [run.setup.objective.theta() for run in runs]
    return Way(study, seconds, dict(zip(tasks, ends, strict=True)))


def one_by_one(runs: list[Run]) -> None:
    """As the local executor, one after another."""
    for run in runs:
        run.execute()


def in_lockstep(runs: list[Run]) -> None:
    """As the lockstep executor, in one group."""
    for error in LockstepRuns(runs).execute():
        if error is not None:
            raise error


def column(way: Way, task: Task, name: str) -> np.ndarray:
    """A column of a run's table without its gaps."""
    values = way.study.run(task.seed, task.branch).read_metrics()[name].to_pylist()
    return np.array([value for value in values if value is not None])


def report(spec: Spec, alone: Way, lockstep: Way, begun: dict[int, Tensor]) -> None:
    """A line for each branch, mean or largest over seeds; then the ratio of the times."""
    print(f"{'branch':18} {'counted alone':>14} {'in lockstep':>12} {'loss':>9} {'end':>9}")
    for name in spec.branches:
        tasks = [task for task in alone.ends if task.branch == name]
        counted = [
            np.mean([column(way, task, "subspace_gradients").mean() for task in tasks])
            for way in (alone, lockstep)
        ]
        losses = [
            np.abs(column(lockstep, task, "loss") / column(alone, task, "loss") - 1).max()
            for task in tasks
        ]
        apart = [
            float(
                (lockstep.ends[t] - alone.ends[t]).norm() / (alone.ends[t] - begun[t.seed]).norm()
            )
            for t in tasks
        ]
        print(
            f"{name:18} {counted[0]:14.2f} {counted[1]:12.2f} {max(losses):9.1e} {max(apart):9.1e}"
        )
    print(
        f"one by one {alone.seconds:.1f} s, in lockstep {lockstep.seconds:.1f} s,"
        f" ratio {alone.seconds / lockstep.seconds:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("spec", help="a built-in spec, or a TOML file")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--words", nargs=argparse.REMAINDER, default=[], help="for thalweg run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    seeds = ("--seeds", *map(str, range(options.seeds)))
    spec = load_spec(options.spec, [*SMOKE, *seeds, *options.words])
    spec = with_way_to_multiply(spec, 256, 10**9)
    device = resolve_device(spec.device)
    compute_repeatably(device)
    with tempfile.TemporaryDirectory() as folder:
        report(spec, *compare(spec, Path(folder), device))


if __name__ == "__main__":
    main()
