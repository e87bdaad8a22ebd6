"""How do time and memory grow with samples N, parameters P and dimensions k?

One of the three is varied at a time around a base case: an MLP 784-h-h-10 (tanh, half squared
error) on random data of MNIST's shape, one thread. Every row has a process of its own. Memory is
the most that the process held, less the most it held up to its first gradient, data included; a
float has 4 bytes. A gradient is the median of five, timed in the same process. The operations:

    product   H @ V for a block V (P, k)
    solve     the top k eigenpairs from scratch, residual 1e-3, the graph of one chunk at a time
    kept      the same with the graphs of all chunks kept

Exponents are slopes of log(cost) against log(size), over all sizes and over the last two: small
sizes are bound by overheads.

    python benchmarks/growth.py
    python benchmarks/growth.py --operations solve --vary N --json rows.json
    python benchmarks/growth.py --quick        # small sizes only, to try it
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from thalweg.loss.objective import Objective
from thalweg.operators.hessian import Hessian
from thalweg.spectrum.eigensolver import top_eigenpairs

SIZES = {
    "N": [1000, 2000, 5000, 10_000, 20_000, 50_000],
    "P": [10_000, 100_000, 1_000_000, 10_000_000],
    "k": [1, 2, 5, 10, 20, 50],
}
QUICK_SIZES = {"N": [100, 200], "P": [10_000, 20_000], "k": [1, 3]}


@dataclass(frozen=True)
class Case:
    """What is done, and with how much."""

    operation: str
    N: int = 1000
    P: int = 200_000
    k: int = 10


SMALL = Case("", N=100, P=10_000, k=3)


def half_squared_error(output: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (output - target).square().sum(dim=1).mean()


def objective_of(case: Case) -> Objective:
    """P is met as nearly as the hidden width h allows: h^2 + 796 h + 10 = P."""
    width = max(1, round(math.sqrt(398**2 + case.P - 10) - 398))
    torch.manual_seed(0)
    layers = nn.Linear(784, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()
    model = nn.Sequential(*layers, nn.Linear(width, 10))
    targets = torch.eye(10)[torch.randint(10, (case.N,))]
    return Objective(model, half_squared_error, (torch.rand(case.N, 784), targets))


def perform(objective: Objective, case: Case) -> dict[str, Any]:
    """The operation; what it says about itself."""
    hessian = Hessian(objective, keep_graph=case.operation == "kept")
    if case.operation == "product":
        _ = hessian @ torch.randn(case.k, objective.num_parameters).T
        return {"products": hessian.num_matvecs}
    space = top_eigenpairs(hessian, case.k, tolerance=1e-3)
    assert space.residuals is not None
    return {"products": space.num_matvecs, "residual": float(space.residuals.max())}


def measure(case: Case) -> dict[str, Any]:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    # What torch loads when it is first asked for it takes a second and 35 MiB: not a cost of size.
    perform(objective_of(SMALL), replace(SMALL, operation=case.operation))
    objective = objective_of(case)
    gradient = statistics.median(seconds_of_gradients(objective))
    before = most_memory()
    if case.operation == "product":
        perform(objective, case)  # the first block of a size finds out how to multiply fastest
    begin = time.perf_counter()
    said = perform(objective, case)
    seconds = time.perf_counter() - begin
    memory = most_memory() - before
    return asdict(case) | {
        "P": objective.num_parameters,
        **said,
        "seconds": seconds,
        "gradient_seconds": gradient,
        "gradients": seconds / gradient,
        "bytes": memory,
        "floats": memory / (4 * objective.num_parameters * case.k),
    }


def seconds_of_gradients(objective: Objective) -> Iterator[float]:
    objective.gradient()
    for _ in range(5):
        begin = time.perf_counter()
        objective.gradient()
        yield time.perf_counter() - begin


def most_memory() -> int:
    """The most bytes that this process has held so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def row_of(case: Case, limit: float) -> dict[str, Any]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        try:
            return pool.apply_async(measure, (case,)).get(limit)
        except multiprocessing.TimeoutError:
            return asdict(case) | {"status": f"stopped at {limit:g} s, or out of memory"}


def line(row: dict[str, Any]) -> str:
    start = f"{row['operation']:8}{row['N']:>8}{row['P']:>10}{row['k']:>4}"
    if "status" in row:
        return f"{start}  {row['status']}"
    residual = f"{row['residual']:.1e}" if "residual" in row else "-"
    return (
        f"{start}{row['products']:>9.0f}{row['gradients']:>11.1f}{row['seconds']:>10.3f}"
        f"{row['bytes'] / 2**20:>9.1f}{row['floats']:>14.1f}{residual:>10}"
    )


def exponents(rows: list[dict[str, Any]], varied: str) -> str:
    """How seconds, seconds a product, and memory grow with what was varied."""
    found = []
    for name in ("seconds", "seconds a product", "memory"):
        points = [(row[varied], cost_of(row, name)) for row in rows if "status" not in row]
        points = [point for point in points if point[1] > 0]
        if len(points) < 2:
            continue
        x, y = np.log(np.array(points)).T
        everywhere, at_the_end = np.polyfit(x, y, 1)[0], np.polyfit(x[-2:], y[-2:], 1)[0]
        found.append(f"{name} ~ {varied}^{everywhere:.2f} (last two: {at_the_end:.2f})")
    return ", ".join(found)


def cost_of(row: dict[str, Any], name: str) -> float:
    if name == "memory":
        return row["bytes"]
    return row["seconds"] / (row["products"] if name == "seconds a product" else 1)


def main() -> None:
    options = options_of_command_line()
    # Before the processes start: BLAS reads it at its import.
    os.environ["OMP_NUM_THREADS"] = "1"
    print(f"threads 1, torch {torch.__version__}, float32 on the CPU")
    sizes, base = SIZES, Case("")
    if options.quick:
        sizes, base = QUICK_SIZES, SMALL
    rows: list[dict[str, Any]] = []
    for operation in options.operations:
        for varied in options.vary:
            print(
                f"\n{'':8}{'N':>8}{'P':>10}{'k':>4}{'products':>9}{'gradients':>11}{'seconds':>10}"
                f"{'MiB':>9}{'floats / (Pk)':>14}{'residual':>10}"
            )
            here = []
            for size in sizes[varied]:
                case = replace(base, operation=operation, **{varied: size})
                here.append(row_of(case, options.limit))
                print(line(here[-1]), flush=True)
            print(exponents(here, varied))
            rows += [row | {"varied": varied} for row in here]
    if options.json is not None:
        about = {"threads": 1, "torch": torch.__version__, "rows": rows}
        options.json.write_text(json.dumps(about, indent=1) + "\n")


def options_of_command_line() -> argparse.Namespace:
    operations = ["product", "solve", "kept"]
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--operations", nargs="+", choices=operations, default=operations)
    parser.add_argument("--vary", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--quick", action="store_true", help="small sizes only")
    parser.add_argument("--limit", type=float, default=900, help="seconds for a row")
    parser.add_argument("--json", type=Path, help="file for the rows")
    return parser.parse_args()


if __name__ == "__main__":
    main()
