"""What does a block of products with the Hessian cost: vector by vector, vectorized, recorded?

First for one run: a gradient, and products over all samples on a kept graph with one vector and
with a block, a backward pass for each vector or one for all; in gradients. Then for three runs in
lockstep, as their trackers multiply: each run's k vectors on both halves of a subset of its own,
through the nested transforms of `torch.func`, by the operations that these were recorded to be (on
a GPU also as a CUDA graph), and compiled. Medians, in milliseconds.

    python benchmarks/products.py digits
    python benchmarks/products.py mnist --data-dir DIR --device cuda --subsets 64 512 2048
    TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 python benchmarks/products.py mnist --data-dir DIR \
        --device cuda       # matrix products in TF32
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import vmap
from torch.fx.experimental.proxy_tensor import make_fx

from thalweg.errors import InvalidInput
from thalweg.lab.config import PROBLEM_SPECS, load_spec
from thalweg.loss.lockstep_objective import LockstepObjective
from thalweg.loss.objective import Objective
from thalweg.loss.replay import Replay
from thalweg.measure.clock import now
from thalweg.operators.hessian import Hessian
from thalweg.problems import Problem, build_problem

RUNS, BLOCK = 3, 5
ALL = 2**31


def milliseconds(call: Callable[[], object], device: torch.device, times: int = 10) -> float:
    """The median of several calls, each waited for; the first ones warm up."""
    each = []
    for _ in range(times + 2):
        begin = now(device)
        call()
        each.append(1e3 * (now(device) - begin))
    return statistics.median(each[2:])


def of_one_run(problem: Problem) -> None:
    """A gradient, one vector, and a block both ways."""
    objective = Objective(problem.model, problem.loss, problem.train)
    device, size = objective.device, objective.num_parameters
    gradient = milliseconds(objective.gradient, device)
    print(f"a gradient of {objective.num_samples} samples, P = {size}: {gradient:.2f} ms")
    block = torch.randn(size, BLOCK, device=device, dtype=objective.dtype)
    ways = {"one vector": (block[:, :1], 0), f"{BLOCK}, one by one": (block, 0)}
    ways[f"{BLOCK}, vectorized"] = (block, ALL)
    for name, (vectors, up_to) in ways.items():
        given = Objective(problem.model, problem.loss, problem.train, vectorize_up_to=up_to)
        hessian = Hessian(given, keep_graph=True)
        try:
            taken = milliseconds(lambda h=hessian, v=vectors: h @ v, device)
        except InvalidInput as error:
            print(f"  {name:28} {error}")
            continue
        print(f"  {name:28} {taken / gradient:8.2f} gradients")


def in_lockstep(problem: Problem, subset: int, k: int, *, compiled: bool) -> None:
    """The products of three runs over both halves of a subset."""
    objective = Objective(problem.model, problem.loss, problem.train)
    runs = LockstepObjective(objective)
    theta, device = objective.theta(), objective.device
    halves = torch.arange(subset, device=device).reshape(2, -1)
    inputs, targets = (part[halves].repeat(RUNS, *(1,) * part.dim()) for part in problem.train)
    thetas = theta.repeat(2 * RUNS, 1)
    rows = torch.randn(2 * RUNS, k, len(theta), device=device, dtype=theta.dtype)
    every = vmap(runs._block_products, in_dims=(0, 0, 0))

    def products(thetas: Tensor, rows: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        return every(thetas, rows, (inputs, targets))

    given = (thetas, rows, inputs, targets)
    with objective.evaluator.settings():
        recorded = make_fx(products)(*given)
        ways: dict[str, Callable[..., Tensor]] = {
            "nested transforms": products,
            "recorded operations": recorded,
        }
        if device.type == "cuda":
            replay = Replay()
            ways["recorded, a CUDA graph"] = lambda *g: replay("products", products, *g)
        if compiled:
            ways["recorded, torch.compile"] = torch.compile(recorded)
        print(f"{RUNS} runs, k = {k}, a subset of {subset} samples:")
        for name, way in ways.items():
            with torch.no_grad() if way is not products else torch.enable_grad():
                begin = now(device)
                way(*given)
                first = now(device) - begin
                taken = milliseconds(lambda w=way: w(*given), device)
            print(f"  {name:28} {taken:8.2f} ms   (the first {first:.1f} s)")


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    words = [] if options.data_dir is None else ["--problem.data.data_dir", options.data_dir]
    spec = load_spec(PROBLEM_SPECS[options.problem], words)
    problem = build_problem(spec.problem, 0, device=options.device)
    print(f"{options.problem} on {options.device}, torch {torch.__version__}")
    of_one_run(problem)
    for subset in options.subsets:
        k = problem.num_classes or 10
        in_lockstep(problem, subset, k, compiled=not options.no_compile)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("problem", choices=list(PROBLEM_SPECS))
    parser.add_argument("--data-dir")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--subsets", type=int, nargs="+", default=[64, 512], help="even numbers")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-compile", action="store_true", help="it takes up to a minute a size")
    return parser.parse_args()


if __name__ == "__main__":
    main()
