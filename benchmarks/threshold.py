"""How many products does a split at a curvature take, and what does it cost along training?

    python benchmarks/threshold.py products digits-cross-entropy
    python benchmarks/threshold.py products tinyshakespeare --data-dir DIR --samples 128 \
        --optimizer adamw --lr 0.001 --steps 300
    python benchmarks/threshold.py along digits-cross-entropy --figure threshold-cost.png
    python benchmarks/threshold.py together digits-cross-entropy

`products`: after some steps of training, the mini-batch gradient of the next step is split by the
Hessian of all samples. A row for each threshold: its share above, then true and estimated error
(relative to the vector) after so many products. The truth is the float64 split, converged to 1e-7.

`along`: training goes on, and each update is split by `ThresholdSource` at some target errors, with
and without few samples. A row for each: gradients a step, counted (a product 1.3) and measured in
gradients timed in the same run, and the true error, median and 95 % of the steps.

`together`: products for the shares of full gradient, mini-batch gradient and update, one by one and
from one Krylov space.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from thalweg.lab.config import load_spec
from thalweg.loss.objective import Objective
from thalweg.operators.hessian import Hessian
from thalweg.problems import build_problem
from thalweg.spectrum.curvature_profile import curvature_profile, curvature_profiles
from thalweg.spectrum.lanczos import LanczosSpace
from thalweg.spectrum.threshold_split import split_at
from thalweg.tracking.threshold_source import ThresholdSource

PARTS = (0.5, 0.2, 0.1, 0.05)
PRODUCTS = (8, 12, 16, 24)
TARGETS = (0.01, 0.03, 0.1)
WIDTH = 0.1
OPTIMIZERS = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}


@dataclass
class Training:
    """A built-in problem in training, and its full loss."""

    objective: Objective
    optimizer: torch.optim.Optimizer
    model: torch.nn.Module
    loss: torch.nn.Module
    data: tuple[Tensor, Tensor]
    batch: int
    generator: torch.Generator

    @classmethod
    def of(cls, options: argparse.Namespace, dtype: torch.dtype) -> Training:
        """Build it, untrained."""
        given = {"problem.data.data_dir": options.data_dir, "problem.samples": options.samples}
        overrides = {key: value for key, value in given.items() if value is not None}
        problem = build_problem(load_spec(options.problem, overrides).problem, 0, dtype)
        objective = Objective(problem.model, problem.loss, problem.train, mode="eval")
        optimizer = OPTIMIZERS[options.optimizer](problem.model.parameters(), lr=options.lr)
        generator = torch.Generator().manual_seed(0)
        return cls(
            objective,
            optimizer,
            problem.model,
            problem.loss,
            problem.train,
            options.batch_size,
            generator,
        )

    def step(self) -> tuple[Tensor, Tensor, Tensor]:
        """Theta before a step, the mini-batch gradient, and the update."""
        chosen = torch.randperm(len(self.data[0]), generator=self.generator)[: self.batch]
        theta = self.objective.theta().clone()
        self.optimizer.zero_grad()
        self.loss(self.model(self.data[0][chosen]), self.data[1][chosen]).backward()
        gradient = torch.cat([p.grad.flatten() for p in self.model.parameters()])
        self.optimizer.step()
        return theta, gradient, self.objective.theta() - theta


def products(options: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Errors by the number of products, in both dtypes, at one theta and for one vector."""
    exact = Training.of(options, torch.float64)
    for _ in range(options.steps):
        exact.step()
    theta, gradient, _ = exact.step()
    for dtype in (torch.float64, torch.float32):
        training = exact if dtype == torch.float64 else Training.of(options, dtype)
        hessian = Hessian(training.objective, theta.to(dtype), keep_graph=True)
        seconds = _seconds_of_a_gradient(training.objective, theta.to(dtype))
        yield from _errors_by_products(exact, theta, gradient, hessian, seconds)


def _errors_by_products(
    exact: Training, theta: Tensor, gradient: Tensor, hessian: Hessian, seconds: float
) -> Iterator[dict[str, object]]:
    vector = gradient.to(hessian.dtype)
    space, seen = LanczosSpace(hessian, vector[:, None]), {}
    begin = time.perf_counter()
    for number in range(1, PRODUCTS[-1] + 1):
        space.grow()
        if number in PRODUCTS:
            seen[number] = (space.compression(), space.coordinates[:, 0])
    of_a_product = (time.perf_counter() - begin) / PRODUCTS[-1] / seconds
    largest = float(torch.linalg.eigvalsh(space.compression().projected)[-1])
    for part in PARTS:
        tau = part * largest
        whole = Hessian(exact.objective, theta, keep_graph=True)
        truth = split_at(whole, gradient, tau, width=WIDTH, error=1e-7, max_matvecs=400)
        row: dict[str, object] = {
            "dtype": str(hessian.dtype).removeprefix("torch."),
            "tau / lambda_1": part,
            "share": f"{truth.profile.share_above(tau, WIDTH).value:.3f}",
            "product": f"{of_a_product:.1f} gradients",
        }
        for number, (compression, coordinates) in seen.items():
            step = compression.step(coordinates, tau, WIDTH)
            inside = torch.nn.functional.pad(
                step.coordinates, (0, space.dimension - len(coordinates))
            )
            above = space.combine(inside).double() * float(gradient.norm())
            error = float((above - truth.above).norm() / gradient.norm())
            estimate = step.error + space.rounding / (WIDTH * tau)
            row[f"{number} products"] = f"{error:.0e} ({estimate:.0e})"
        yield row


def along(options: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Cost and error of splitting every update of a stretch of training."""
    for part in options.parts:
        for target in options.targets:
            for few in (True, False):
                yield _stretch(options, part, target, few)


def _stretch(
    options: argparse.Namespace, part: float, target: float, few: bool
) -> dict[str, object]:
    training = Training.of(options, torch.float32)
    for _ in range(options.steps):
        training.step()
    source = ThresholdSource(training.objective, part, relative=True, error=target, few_samples=few)
    counted, measured, errors, estimates, reports = [], [], [], [], []
    for _ in range(options.length):
        theta, _, update = training.step()
        begin = time.perf_counter()
        source.update(theta, update)
        measured.append(time.perf_counter() - begin)
        report = source.report
        counted.append(report.subspace_cost)
        estimates.append(report.error)
        reports.append(report)
        hessian = Hessian(training.objective, theta, keep_graph=True)
        true = split_at(hessian, update, source.threshold, error=target / 20)
        apart = source.split(update).dominant - true.above
        errors.append(float(apart.norm() / update.norm()))
    seconds = _seconds_of_a_gradient(training.objective, training.objective.theta())
    ratios = [estimate / error for estimate, error in zip(estimates, errors, strict=True)]
    return {
        "tau / lambda_1": part,
        "target": f"{target:.0%}",
        "few samples": "tried" if few else "no",
        "gradients a step": f"{statistics.mean(counted):.1f}",
        "measured": f"{statistics.mean(measured) / seconds:.1f}",
        "over all samples": f"{statistics.mean(report.renewed for report in reports):.0%}",
        "error, median": f"{statistics.median(errors):.2%}",
        "error, 95 %": f"{torch.tensor(errors).quantile(0.95):.2%}",
        "estimate / error, median": f"{statistics.median(ratios):.2f}",
        "below a third": f"{statistics.mean(ratio < 1 / 3 for ratio in ratios):.1%}",
    }


def together(options: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Products for three vectors, one by one and at once."""
    training = Training.of(options, torch.float32)
    for _ in range(options.steps):
        training.step()
    theta, minibatch, update = training.step()
    full = training.objective.value_and_gradient(theta)[1]
    hessian = Hessian(training.objective, theta, keep_graph=True)
    sharpness = float(curvature_profile(hessian, full).nodes[-1])
    for part in PARTS:
        for error in options.targets:
            settings = {"thresholds": [part * sharpness], "error": error}
            vectors = [full, minibatch, update]
            alone = [curvature_profile(hessian, v, **settings).num_matvecs for v in vectors]
            shared = curvature_profiles(hessian, vectors, **settings)[0].num_matvecs
            yield {
                "tau / lambda_1": part,
                "target": f"{error:.1%}",
                "one by one": sum(alone),
                "at once": shared,
            }


def _seconds_of_a_gradient(objective: Objective, theta: Tensor) -> float:
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        objective.value_and_gradient(theta)
        times.append(time.perf_counter() - begin)
    return min(times)


def draw(rows: list[dict[str, str]], path: Path) -> None:
    """Gradients a step against the true error, a line for each threshold and way."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for part in dict.fromkeys(row["tau / lambda_1"] for row in rows):
        for few, style in (("tried", "o-"), ("no", "s--")):
            chosen = [r for r in rows if (r["tau / lambda_1"], r["few samples"]) == (part, few)]
            errors = [float(row["error, median"].rstrip("%")) for row in chosen]
            costs = [float(row["gradients a step"]) for row in chosen]
            name = "few samples where that serves" if few == "tried" else "all samples"
            axes.plot(errors, costs, style, label=f"τ = {part} λ₁, {name}", fillstyle="none")
    axes.set(xscale="log", yscale="log", xlabel="error of the split, median (%)")
    axes.set_ylabel("gradients of the full loss a step, counted")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


MODES = {"products": products, "along": along, "together": together}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=tuple(MODES))
    parser.add_argument("problem", help="a built-in spec, such as digits-cross-entropy")
    parser.add_argument("--data-dir")
    parser.add_argument("--samples", type=int, help="of the problem; default: the spec's")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="sgd")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--steps", type=int, default=500, help="of training before")
    parser.add_argument("--length", type=int, default=30, help="of the stretch, in steps")
    parser.add_argument("--parts", type=float, nargs="+", default=(0.5, 0.1))
    parser.add_argument("--targets", type=float, nargs="+", default=TARGETS)
    parser.add_argument("--figure", type=Path, help="PNG of `along`")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows, writer = [], None
    for row in MODES[options.what](options):
        writer = writer or csv.DictWriter(sys.stdout, list(row), lineterminator="\n")
        if not rows:
            writer.writeheader()
        writer.writerow(row)
        sys.stdout.flush()
        rows.append({key: str(value) for key, value in row.items()})
    if options.figure is not None and options.what == "along":
        draw(rows, options.figure)


if __name__ == "__main__":
    main()
