"""What does a study cost in time, before a change and after it? Pair by pair, both trees in turn.

Each measurement is a process of its own that runs one study in itself (the "inline" executor), so
that the system accounts for all of its processor time. Machines drift: what counts is the ratio of
two neighbours.

    git worktree add ../before COMMIT
    python benchmarks/study_cost.py ../before --pairs 10
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parents[1]
PROGRAM = """
import json, sys, time
import thalweg.analysis, thalweg.lab.training, torch._dynamo
from thalweg.lab.config import parse_spec
from thalweg.lab.study import reproduction_spec, run
changes = json.loads(sys.argv[2])
spec = parse_spec(changes) if "phases" in changes else reproduction_spec("main", overrides=changes)
begun, used = time.perf_counter(), time.process_time()
assert run(spec, root=sys.argv[1], executor="inline").exit_code == 0
print(time.perf_counter() - begun, time.process_time() - used)
"""
TINY: dict[str, Any] = {
    "problem": {
        "data": {"name": "digits"},
        "samples": 200,
        "model": {"name": "mlp", "hidden": [12]},
        "loss": "mse",
        "chunk_size": 256,
        "vectorize_up_to": 0,
    },
    "subspace": {"k": 3},
    "phases": [{"optimizer": {"name": "sgd", "lr": 0.05}, "batch_size": 20, "steps": 50}],
    "branches": {"sgd": {"steps": 50}, "bulk-sgd": {"steps": 50, "split": {"dominant": 0.0}}},
    "probes": {"loss": 1, "sharpness": 5},
    "checkpoint": {"every_steps": 10},
    "claims": [],
    "figures": [],
}
MAIN: dict[str, Any] = {
    "seeds": [0],
    "phases.0.steps": 150,
    "phases.0.until_alignment": "unset",
    "branches.*.steps": 100,
    "problem.chunk_size": 1024,
    "problem.vectorize_up_to": 0,
}
STUDIES = {"tiny": TINY, "main": MAIN}


@dataclass(frozen=True)
class Cost:
    """Seconds of one study, imports not included."""

    wall: float
    processor: float


def measure(tree: Path, study: str) -> Cost:
    """Run a study with the package of a tree."""
    with tempfile.TemporaryDirectory() as root:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", PROGRAM, root, json.dumps(STUDIES[study])],
            env={**os.environ, "PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        sys.exit(done.stderr)
    wall, processor = map(float, done.stdout.split()[-2:])
    return Cost(wall, processor)


def spread(ratios: list[float]) -> str:
    """Median and quartiles of ratios."""
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.3f} (quartiles {low:.3f} to {high:.3f})"


def main() -> None:
    """Compare two trees on each study."""
    parser = argparse.ArgumentParser(description="A study's cost before a change and after it.")
    parser.add_argument("before", type=Path, help="root of a checkout of the tree before")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=list(STUDIES))
    options = parser.parse_args()
    for study in options.studies:
        measure(options.before, study)
        pairs: list[tuple[Cost, Cost]] = []
        begun = time.monotonic()
        for number in range(options.pairs):
            trees = [options.before.resolve(), HERE]
            if number % 2:
                trees.reverse()
            costs = {tree: measure(tree, study) for tree in trees}
            pairs.append((costs[options.before.resolve()], costs[HERE]))
        before, after = zip(*pairs, strict=True)
        print(f"{study}: {options.pairs} pairs in {time.monotonic() - begun:.0f} s, after / before")
        for kind in ("wall", "processor"):
            ratios = [getattr(b, kind) / getattr(a, kind) for a, b in pairs]
            was, now = (statistics.median(getattr(c, kind) for c in e) for e in (before, after))
            print(f"    {kind:9} {spread(ratios)}; medians {was:.2f} s and {now:.2f} s")


if __name__ == "__main__":
    main()
