"""How wrong is a tracked subspace, does its own estimate say so, and what does it cost?

Along training steps the tracked projection of a vector is compared with that on a float64 subspace
solved from scratch at tolerance 1e-6. Cost is measured time, on one thread or one GPU, in units of
one gradient of the full loss, timed in the same run; that gradient itself is not counted. In
full-batch training it is asked of the tracker, whose refinements share its graph.

    python benchmarks/tracker_accuracy.py digits
    python benchmarks/tracker_accuracy.py mnist --data-dir DIR
    python benchmarks/tracker_accuracy.py mnist --data-dir DIR --full-batch --lr 0.05 \
        --warm-up 2500 --steps 100 --check 20 --error 0.04 --bulk-error 0.02   # edge of stability
    python benchmarks/tracker_accuracy.py cifar10 --data-dir DIR --samples 1000 --steps 60 \
        --check 30 --chunk-size 64
    python benchmarks/tracker_accuracy.py sst2 --data-dir DIR --samples 200 --warm-up 300 \
        --steps 40 --check 20
"""

from __future__ import annotations

import argparse
import copy

import numpy as np
import torch
from torch import Tensor

from thalweg.lab.config import PROBLEM_SPECS, load_spec
from thalweg.lab.training.step import minibatch
from thalweg.loss.objective import Objective
from thalweg.measure.clock import now
from thalweg.operators.hessian import Hessian
from thalweg.problems import build_problem
from thalweg.spectrum.eigensolver import top_eigenpairs
from thalweg.tracking.tracker import SubspaceTracker


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    words = [] if options.data_dir is None else ["--problem.data.data_dir", options.data_dir]
    words += [] if options.samples is None else ["--problem.samples", str(options.samples)]
    spec = load_spec(PROBLEM_SPECS[options.problem], words)
    phase = spec.phases[0]
    warm_up = options.warm_up if options.warm_up is not None else phase.steps or 0
    problem = build_problem(spec.problem, options.seed, device=options.device)
    k = options.k or problem.num_classes or 10
    model, (inputs, targets) = problem.model, problem.train
    base = torch.optim.SGD(model.parameters(), options.lr or phase.optimizer.lr)
    size = problem.num_samples if options.full_batch else 50

    def train(step: int) -> None:
        chosen = minibatch(options.seed, step, size, problem.num_samples)
        base.zero_grad()
        problem.loss(model(inputs[chosen]), targets[chosen]).backward()
        base.step()

    for step in range(warm_up):
        train(step)
    chunk_size = options.chunk_size or "auto"
    objective = Objective(model, problem.loss, problem.train, chunk_size=chunk_size)
    exact = _float64(model, problem, k)
    tracker = SubspaceTracker(objective, k, error=options.error, bulk_error=options.bulk_error)
    seconds, gradient = timed(objective, 5)
    tracker.update(vector=gradient)
    rows = []
    for step in range(options.steps):
        train(warm_up + step)
        if options.full_batch:
            # What a gradient with its graph takes beyond one without is the tracker's.
            begin = now(objective.device) + seconds
            gradient = tracker.gradient()
        else:
            gradient = objective.gradient()
            begin = now(objective.device)
        tracker.update(vector=gradient)
        split = tracker.split(gradient)
        spent = now(objective.device) - begin
        counted = tracker.report.subspace_cost + split.subspace_cost
        row = {"time": spent / seconds, "counted": counted, "renewed": tracker.report.renewed}
        if step % options.check == 0:
            row |= compare(exact(objective.theta()), gradient, split, tracker)
        rows.append(row)
    report(rows, seconds)


def compare(space, gradient: Tensor, split, tracker: SubspaceTracker) -> dict[str, float]:
    """True errors of this step, relative to the vector and to its bulk part."""
    vector = gradient.double()
    truth = space.project(vector)
    error = (truth - split.dominant.double()).norm()
    eigenvalues = space.eigenvalues
    tracked = tracker.subspace
    return {
        "error": float(error / vector.norm()),
        "bulk_error": float(error / (vector - truth).norm()),
        "estimate": split.error,
        "alignment": space.alignment(vector),
        "eigenvalue_error": float(
            ((eigenvalues - tracked.eigenvalues.double()) / eigenvalues).abs().max()
        ),
    }


def report(rows: list[dict[str, float]], seconds: float) -> None:
    def column(name: str) -> np.ndarray:
        return np.array([row[name] for row in rows if name in row])

    error, bulk, estimate = column("error"), column("bulk_error"), column("estimate")
    ratio = estimate / error
    print(f"one gradient {1000 * seconds:.1f} ms, alignment {column('alignment').mean():.3f}")
    print(
        f"error of P_k g      median {np.median(error):.3%}   95 % {np.quantile(error, 0.95):.3%}"
    )
    print(f"of the bulk part    median {np.median(bulk):.3%}   95 % {np.quantile(bulk, 0.95):.3%}")
    low, high = np.quantile(ratio, [0.05, 0.95])
    print(f"estimate / error    median {np.median(ratio):.2f}   5 % {low:.2f}   95 % {high:.2f}")
    of_eigenvalues = np.median(column("eigenvalue_error"))
    print(f"eigenvalues         median of the largest relative error {of_eigenvalues:.3%}")
    measured, counted = column("time").mean(), column("counted").mean()
    print(f"cost a step         measured {measured:.2f} gradients, counted {counted:.2f}")
    print(f"renewed             at {column('renewed').mean():.1%} of steps")


def timed(objective: Objective, times: int) -> tuple[float, Tensor]:
    """The full gradient, and the median of the seconds that it takes."""
    gradient = objective.gradient()
    each = []
    for _ in range(times):
        begin = now(objective.device)
        gradient = objective.gradient()
        each.append(now(objective.device) - begin)
    return float(np.median(each)), gradient


def _float64(model, problem, k: int):
    """Solve for S_k at a theta in float64, from scratch."""
    twin = copy.deepcopy(model).double()
    inputs, targets = problem.train
    # Token ids stay whole numbers.
    inputs, targets = (t.double() if t.is_floating_point() else t for t in (inputs, targets))
    objective = Objective(twin, problem.loss, (inputs, targets))

    def solve(theta: Tensor):
        hessian = Hessian(objective, theta.double(), keep_graph=True)
        return top_eigenpairs(hessian, k, tolerance=1e-6, check_repeated=0)

    return solve


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("problem", choices=PROBLEM_SPECS)
    parser.add_argument("--data-dir")
    parser.add_argument("--samples", type=int)
    parser.add_argument("--k", type=int, help="default: the number of classes")
    parser.add_argument("--lr", type=float, help="default: as in the problem's spec")
    parser.add_argument("--full-batch", action="store_true")
    parser.add_argument("--warm-up", type=int, help="steps; default: as in the problem's spec")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--check", type=int, default=10)
    parser.add_argument("--error", type=float, default=0.01)
    parser.add_argument("--bulk-error", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--chunk-size", type=int, help="samples at once")
    return parser.parse_args()


if __name__ == "__main__":
    main()
