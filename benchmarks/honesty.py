"""Does a tracker's error estimate tell the truth? Step by step, against dense float64 Hessians.

Small networks on digits, so that all eigenvectors are known at every step: the error of the tracked
projection of the gradient, and what the tracker said it was. Printed for each regime: the ratio
lambda_{k+1} / lambda_k, the true error (median, 95 %), quantiles of estimate over truth, the
fraction of steps below a third and a tenth of the truth, steps called ill defined, and the
counted cost of a step in gradients.

    python benchmarks/honesty.py                     # every regime: about an hour on one thread
    python benchmarks/honesty.py ce-sgd:3,10 edge:5  # some, each with its k
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from thalweg.loss.objective import Objective
from thalweg.operators.hessian import Hessian
from thalweg.spectrum.gap import GapClosed
from thalweg.tracking.source import TargetMissed
from thalweg.tracking.tracker import SubspaceTracker


@dataclass(frozen=True)
class Regime:
    """A training, and the dimensions to track along it."""

    optimizer: Callable[..., torch.optim.Optimizer]
    k: tuple[int, ...]
    squared: bool = False
    network: tuple[int, ...] = (64, 10, 10)
    activation: type[nn.Module] = nn.Tanh
    batch: int = 50
    warm_up: int = 300
    steps: int = 120
    stride: int = 1
    samples: int = 400


def sgd(lr: float, momentum: float = 0.0) -> Callable[..., torch.optim.Optimizer]:
    return lambda parameters: torch.optim.SGD(parameters, lr=lr, momentum=momentum)


def adam(parameters) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=3e-3)


RELU = {"activation": nn.ReLU, "warm_up": 200}
REGIMES = {
    "mse-sgd": Regime(sgd(0.05), (3, 6, 8, 10, 12), squared=True),
    "mse-adam": Regime(adam, (9, 10), squared=True, warm_up=200),
    "edge": Regime(sgd(0.14), (4, 5, 10), squared=True, batch=400, warm_up=1500),
    "mse-every-7": Regime(sgd(0.05), (3, 10), squared=True, steps=80, stride=7),
    "mse-20-samples": Regime(sgd(0.05), (3, 9), squared=True, batch=5, samples=20),
    "ce-sgd": Regime(sgd(0.2), (2, 3, 5, 10)),
    "ce-slow": Regime(sgd(0.05), (3, 10), warm_up=600),
    "ce-fast": Regime(sgd(0.5), (3, 10)),
    "ce-ten-times": Regime(sgd(2.0), (3, 10)),
    "ce-momentum": Regime(sgd(0.05, 0.9), (3, 5, 10)),
    "ce-adam": Regime(adam, (3, 4, 10), warm_up=200),
    "ce-relu": Regime(adam, (3, 4, 9), **RELU),
    "ce-relu-deep": Regime(adam, (3, 9), network=(64, 8, 8, 10), batch=32, samples=128, **RELU),
    "ce-every-7": Regime(sgd(0.2), (3, 10), steps=80, stride=7),
    "ce-20-samples": Regime(sgd(0.2), (3, 10), batch=5, samples=20),
}


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", GapClosed)
    warnings.simplefilter("ignore", TargetMissed)
    for word in sys.argv[1:] or REGIMES:
        name, _, given = word.partition(":")
        regime = REGIMES[name]
        dimensions = [int(k) for k in given.split(",")] if given else list(regime.k)
        for k, rows in measure(regime, dimensions).items():
            report(f"{name} k={k}", rows)


def half_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    wanted = nn.functional.one_hot(targets, outputs.shape[1]).to(outputs)
    return (outputs - wanted).square().sum(1).mean() / 2


def training(regime: Regime) -> tuple[Objective, Iterator[None]]:
    """The loss over all samples, and its training, which stops where the subspace is asked for."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in zip(regime.network[:-1], regime.network[1:], strict=True):
        layers += [nn.Linear(inputs, outputs), regime.activation()]
    model = nn.Sequential(*layers[:-1]).double()
    loss = half_squared_error if regime.squared else nn.CrossEntropyLoss()
    digits = load_digits()
    x = torch.tensor(digits.data / 16)[: regime.samples]
    y = torch.tensor(digits.target)[: regime.samples]
    optimizer = regime.optimizer(model.parameters())
    generator = torch.Generator().manual_seed(1)

    def steps() -> Iterator[None]:
        for step in range(regime.warm_up + regime.steps * regime.stride):
            if step >= regime.warm_up and (step - regime.warm_up) % regime.stride == 0:
                yield
            chosen = torch.arange(regime.samples)
            if regime.batch < regime.samples:
                chosen = torch.randint(0, regime.samples, (regime.batch,), generator=generator)
            optimizer.zero_grad()
            loss(model(x[chosen]), y[chosen]).backward()
            optimizer.step()

    return Objective(model, loss, (x, y)), steps()


def measure(regime: Regime, dimensions: list[int]) -> dict[int, list[dict[str, float]]]:
    objective, steps = training(regime)
    trackers = {k: SubspaceTracker(objective, k) for k in dimensions}
    rows: dict[int, list[dict[str, float]]] = {k: [] for k in dimensions}
    identity = torch.eye(objective.num_parameters, dtype=torch.float64)
    for _ in steps:
        gradient, matrix = objective.gradient(), Hessian(objective) @ identity
        values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
        values, vectors = values.flip(0), vectors.flip(1)
        for k, tracker in trackers.items():
            tracker.update(vector=gradient)
            true = vectors[:, :k] @ (vectors[:, :k].T @ gradient)
            error = (tracker.split(gradient).dominant - true).norm() / gradient.norm()
            rows[k].append(
                {
                    "ratio": float(values[k] / values[k - 1]),
                    "error": float(error),
                    "estimate": tracker.report.error,
                    "cost": tracker.report.subspace_cost,
                    "ill": tracker.report.ill_defined,
                }
            )
    # The first step solves.
    return {k: each[1:] for k, each in rows.items()}


def report(label: str, rows: list[dict[str, float]]) -> None:
    def column(name: str) -> np.ndarray:
        return np.array([row[name] for row in rows])

    error, estimate = column("error"), column("estimate")
    ratios = estimate / np.maximum(error, 1e-12)
    low, median, high = np.quantile(ratios, [0.05, 0.5, 0.95])
    print(
        f"{label:22s} r {np.median(column('ratio')):.2f}  true {np.median(error):6.2%} /"
        f" {np.quantile(error, 0.95):6.2%}  said {np.median(estimate):6.2%}  said / true {low:.2f}"
        f" {median:.2f} {high:.1f}  below 1/3 {np.mean(ratios < 1 / 3):.2f}, 1/10"
        f" {np.mean(ratios < 0.1):.2f}  ill defined {column('ill').mean():.2f}  cost"
        f" {column('cost').mean():.2f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
