"""What does a sweep cost beside its runs, as their number grows?

Runs that take no time: an MLP 64-8-10 on 100 digits, two steps, the loss measured. Each command has
a process of its own, one thread:

    plan     build every point, make its folder (`executor` that submits nothing)
    run      do the runs by the local executor, seconds a run with two workers
    again    the same command once more: everything is done
    list     `thalweg list`
    report   `thalweg report`: verdicts, pictures, page
    load     all rows as one data frame

Memory is the most that the driver held; its processes have their own.

    python benchmarks/sweep_overhead.py
    python benchmarks/sweep_overhead.py --runs 10 100 --json rows.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SPEC = """
name = "tiny"
problem = { data = { name = "digits" }, samples = 100, model = { name = "mlp", hidden = [8] }, \
loss = "mse", chunk_size = 100, vectorize_up_to = 0 }
subspace = { k = 2 }
phases = [{ optimizer = { name = "sgd", lr = 0.1 }, batch_size = 10, steps = 2 }]
probes = { loss = 1 }
figures = []
checkpoint = { keep = 1 }
"""

COMMAND = """
import json, resource, sys, time
from thalweg import lab
from thalweg.cli import main
from thalweg.lab.execution.schedule import Outcome

def nowhere(assignment):
    return Outcome(left_out=list(assignment.tasks), submitted="nothing")

if __name__ == "__main__":
    what, count = sys.argv[1], int(sys.argv[2])
    step = 0.5 / count
    rates = [round(0.1 + step * number, 9) for number in range(count)]
    begun = time.monotonic()
    if what in ("plan", "run", "again"):
        executor = nowhere if what == "plan" else "local"
        lab.sweep("tiny.toml", grid={"lr": rates}, name="many", workers=2, executor=executor)
    elif what == "load":
        assert lab.load("runs/many").study.nunique() == count
    else:
        words = {"list": ["list"], "report": ["report", "many"]}[what]
        try:
            main(words)
        except SystemExit as ending:
            assert not ending.code, ending
    seconds = time.monotonic() - begun
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "megabytes": memory}), file=sys.stderr)
"""
STEPS = ("plan", "run", "again", "list", "load", "report")


def measure(count: int) -> list[dict[str, Any]]:
    """A row for each command over so many runs."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tiny.toml").write_text(SPEC, encoding="utf-8")
        (Path(folder) / "command.py").write_text(COMMAND, encoding="utf-8")
        for what in STEPS:
            done = subprocess.run(
                [sys.executable, "command.py", what, str(count)],
                cwd=folder,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                raise SystemExit(f"{what} of {count} runs failed:\n{done.stderr}")
            found = json.loads(done.stderr.splitlines()[-1])
            rows.append({"runs": count, "what": what, **found})
            a_run = 1000 * found["seconds"] / count
            print(
                f"{count:6} runs  {what:7} {found['seconds']:8.1f} s  {a_run:8.1f} ms a run"
                f"  {found['megabytes']:6.0f} MB",
                flush=True,
            )
    return rows


def main() -> None:
    """Measure, and print a line for each command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    rows = [row for count in options.runs for row in measure(count)]
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
