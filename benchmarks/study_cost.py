"""What does a study cost in time, before a change and after it? Pair by pair, both trees in turn.

Each measurement is a process of its own that runs one study in itself (the "inline" executor), so
that the system accounts for all of its processor time. Machines drift: what counts is the ratio of
two neighbours.

    git worktree add ../before COMMIT
    python benchmarks/study_cost.py ../before --pairs 10
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parents[1]
PROGRAM = """
import sys, time
from thalweg.lab.study import reproduce
begun, used = time.perf_counter(), time.process_time()
result = reproduce("main", "digits", overrides=sys.argv[2:], root=sys.argv[1], executor="inline")
assert result.exit_code == 0
print(time.perf_counter() - begun, time.process_time() - used)
"""
STUDIES = {
    "tiny": {"problem.samples": 200, "phases.0.steps": 12, "branches.*.steps": 12},
    "digits": {"phases.0.steps": 150, "branches.*.steps": 100},
}
SHARED = {
    "seeds": 0,
    "phases.0.until_alignment": "unset",
    "problem.chunk_size": 1024,
    "problem.vectorize_up_to": 0,
}


@dataclass(frozen=True)
class Cost:
    """Seconds of one study, imports not included."""

    wall: float
    processor: float


def measure(tree: Path, study: str) -> Cost:
    """Run a study with the package of a tree."""
    values = {**SHARED, **STUDIES[study]}
    overrides = [word for key in values for word in (f"--{key}", str(values[key]))]
    with tempfile.TemporaryDirectory() as root:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", PROGRAM, root, *overrides],
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
