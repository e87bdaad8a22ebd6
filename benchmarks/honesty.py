"""Does a tracker's error estimate tell the truth? Step by step, against dense float64 Hessians.

Small networks on digits, so that all eigenvectors are known at every step: the error of the tracked
projection of the gradient, and what the tracker said it was. Printed for each regime: the ratio
lambda_{k+1} / lambda_k, the true error (median, 95 %), what was said, quantiles of said over true,
the fraction of steps below a third and a tenth of the truth, the fraction of steps called ill
defined or off the target, and the counted cost of a step in gradients. Steps whose true error is
below 1e-6 count as met: there is nothing to say.

    python benchmarks/honesty.py                       # every regime: about 20 minutes, one thread
    python benchmarks/honesty.py ce-sgd:3,10 edge:5    # some, each with its k
    python benchmarks/honesty.py --rows rows.csv       # and keep every step
    python benchmarks/honesty.py --read rows.csv --figure error-estimate.png   # the figure of them
"""

from __future__ import annotations

import argparse
import copy
import csv
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from thalweg.loss.objective import Objective
from thalweg.operators.hessian import Hessian
from thalweg.spectrum.gap import GapClosed
from thalweg.tracking.source import TargetMissed
from thalweg.tracking.tracker import SubspaceTracker

SMALLEST = 1e-6
"""A true error below this is none."""


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
    steps: int = 60
    stride: int = 1
    samples: int = 400
    single: bool = False
    weighted: bool = False
    jump_every: int = 0


def sgd(lr: float, momentum: float = 0.0) -> Callable[..., torch.optim.Optimizer]:
    return lambda parameters: torch.optim.SGD(parameters, lr=lr, momentum=momentum)


def adam(parameters) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=3e-3)


RELU = {"activation": nn.ReLU, "warm_up": 200}
ATTENTION: tuple[int, ...] = ()
"""In place of layer sizes: a small Transformer, an image being a phrase of its eight rows."""
REGIMES = {
    "mse-sgd": Regime(sgd(0.05), (3, 6, 9, 12), squared=True),
    "mse-adam": Regime(adam, (9, 10), squared=True, warm_up=200),
    "edge": Regime(sgd(0.14), (4, 5, 10), squared=True, batch=400, warm_up=1500),
    "mse-every-7": Regime(sgd(0.05), (3, 9), squared=True, steps=40, stride=7),
    "mse-20-samples": Regime(sgd(0.05), (3, 9), squared=True, batch=5, samples=20),
    "mse-float32": Regime(sgd(0.05), (6, 9), squared=True, single=True),
    "mse-jumps": Regime(sgd(0.05), (3, 9), squared=True, jump_every=10),
    "ce-sgd": Regime(sgd(0.2), (2, 3, 5, 10)),
    "ce-slow": Regime(sgd(0.05), (3, 10), warm_up=600),
    "ce-fast": Regime(sgd(0.5), (3, 10)),
    "ce-ten-times": Regime(sgd(2.0), (3, 10)),
    "ce-momentum": Regime(sgd(0.05, 0.9), (3, 5, 10)),
    "ce-adam": Regime(adam, (3, 4, 10), warm_up=200),
    "ce-relu": Regime(adam, (3, 4, 9), **RELU),
    "ce-relu-deep": Regime(adam, (3, 9), network=(64, 8, 8, 10), batch=32, samples=128, **RELU),
    "ce-every-7": Regime(sgd(0.2), (3, 10), steps=40, stride=7),
    "ce-20-samples": Regime(sgd(0.2), (3, 10), batch=5, samples=20),
    "ce-class-weights": Regime(sgd(0.1), (3, 5, 10), weighted=True),
    "ce-float32": Regime(sgd(0.2), (3, 10), single=True),
    "ce-jumps": Regime(sgd(0.2), (3, 10), jump_every=10),
    "ce-transformer": Regime(adam, (3, 9), network=ATTENTION, samples=80, warm_up=150, steps=25),
    "crossing": Regime(sgd(0.0), (2,)),
}


class SmallTransformer(nn.Module):
    """One layer of attention over the eight rows of an image, P = 554."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True)
        self.out = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(x.unflatten(-1, (8, 8))).mean(1))


class Crossing(nn.Module):
    """A quadratic of 30 directions, the third of which overtakes the second as p grows to 1."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.ones(30))
        self.p = nn.Parameter(torch.zeros(1))

    def forward(self, each: Tensor) -> Tensor:
        rest = torch.linspace(1.0, -0.3, 27).to(each)
        third = 2 + 4 * self.p.detach()
        curvature = torch.cat([each.new_tensor([8.0, 4.0]), third, rest])
        return (each * curvature * self.x.square()).sum(1) / 2 + 0 * self.p.sum()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("regimes", nargs="*", help="names of regimes, each with its k: ce-sgd:3,10")
    parser.add_argument("--rows", type=Path, help="a CSV file for every step")
    parser.add_argument("--read", type=Path, help="take the steps from such a file instead")
    parser.add_argument("--figure", type=Path, help="draw estimate against truth")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", GapClosed)
    warnings.simplefilter("ignore", TargetMissed)
    found: dict[str, list[dict[str, float]]] = {}
    if given.read:
        found = read(given.read)
        for label, rows in found.items():
            report(label, rows)
    for word in [] if given.read else given.regimes or REGIMES:
        name, _, dimensions = word.partition(":")
        ks = [int(k) for k in dimensions.split(",")] if dimensions else list(REGIMES[name].k)
        for k, rows in measure(REGIMES[name], ks, name == "crossing").items():
            found[f"{name} k={k}"] = rows
            report(f"{name} k={k}", rows)
            if given.rows:
                keep(given.rows, f"{name} k={k}", rows)
    if given.figure:
        draw(found, given.figure)


def half_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    wanted = nn.functional.one_hot(targets, outputs.shape[1]).to(outputs)
    return (outputs - wanted).square().sum(1).mean() / 2


def network(regime: Regime) -> nn.Module:
    if regime.network == ATTENTION:
        return SmallTransformer()
    layers: list[nn.Module] = []
    for inputs, outputs in zip(regime.network[:-1], regime.network[1:], strict=True):
        layers += [nn.Linear(inputs, outputs), regime.activation()]
    return nn.Sequential(*layers[:-1])


Training = tuple[Objective, Callable[[], Objective], Iterator[None]]
"""The loss over all samples, the same in float64 at the parameters of now, and the steps."""


def training(regime: Regime) -> Training:
    """The loss over all samples, and its training, which stops where the subspace is asked for."""
    torch.manual_seed(0)
    model = network(regime).to(torch.float32 if regime.single else torch.float64)
    digits = load_digits()
    x = torch.tensor(digits.data / 16)[: regime.samples].to(next(model.parameters()))
    y = torch.tensor(digits.target)[: regime.samples]
    weight = torch.linspace(0.2, 3.0, 10).to(x) if regime.weighted else None
    loss = half_squared_error if regime.squared else nn.CrossEntropyLoss(weight)
    optimizer = regime.optimizer(model.parameters())
    generator = torch.Generator().manual_seed(1)

    def steps() -> Iterator[None]:
        there = copy.deepcopy(model.state_dict())
        for step in range(regime.warm_up + regime.steps * regime.stride):
            if step == max(regime.warm_up - 50, 1):
                there = copy.deepcopy(model.state_dict())
            looked = step - regime.warm_up
            if looked >= 0 and looked % regime.stride == 0:
                # Back to what was saved, and on from there.
                if regime.jump_every and looked % regime.jump_every == regime.jump_every - 1:
                    here = copy.deepcopy(model.state_dict())
                    model.load_state_dict(there)
                    there = here
                yield
            chosen = torch.arange(regime.samples)
            if regime.batch < regime.samples:
                chosen = torch.randint(0, regime.samples, (regime.batch,), generator=generator)
            optimizer.zero_grad()
            loss(model(x[chosen]), y[chosen]).backward()
            optimizer.step()

    by_weight = None if weight is None else lambda batch: weight[batch[1]].sum()

    def exact() -> Objective:
        doubled = copy.deepcopy(model).double()
        return Objective(doubled, loss, (x.double(), y), batch_weight=by_weight)

    return Objective(model, loss, (x, y), batch_weight=by_weight), exact, steps()


def crossing(regime: Regime) -> Training:
    """A quadratic whose samples have curvatures that differ by a third."""
    torch.manual_seed(0)
    model = Crossing().double()
    each = 1 + torch.randn(regime.samples, 30).double() / 3
    each = each / each.mean(0)

    def steps() -> Iterator[None]:
        for step in range(regime.steps):
            model.p.data.fill_(step / regime.steps)
            yield

    data = (each, torch.zeros(regime.samples))
    objective = Objective(model, lambda output, _: output.mean(), data)
    return objective, lambda: objective, steps()


def dense(exact: Objective) -> tuple[Tensor, Tensor]:
    """All eigenvalues and eigenvectors of the Hessian in float64, descending."""
    matrix = Hessian(exact) @ torch.eye(exact.num_parameters, dtype=torch.float64)
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return values.flip(0), vectors.flip(1)


def measure(
    regime: Regime, dimensions: list[int], crosses: bool = False
) -> dict[int, list[dict[str, float]]]:
    objective, exact, steps = crossing(regime) if crosses else training(regime)
    trackers = {k: SubspaceTracker(objective, k) for k in dimensions}
    rows: dict[int, list[dict[str, float]]] = {k: [] for k in dimensions}
    for _ in steps:
        gradient = objective.gradient()
        values, vectors = dense(exact())
        for k, tracker in trackers.items():
            tracker.update(vector=gradient)
            vector = gradient.double()
            true = vectors[:, :k] @ (vectors[:, :k].T @ vector)
            error = (tracker.split(gradient).dominant.double() - true).norm() / vector.norm()
            rows[k].append(
                {
                    "ratio": float(values[k] / values[k - 1]),
                    "error": float(error),
                    "estimate": tracker.report.error,
                    "cost": tracker.report.subspace_cost,
                    "ill": tracker.report.ill_defined,
                    "met": tracker.report.target_met,
                }
            )
    # The first step solves.
    return {k: each[1:] for k, each in rows.items()}


def keep(path: Path, label: str, rows: list[dict[str, float]]) -> None:
    """Append the steps of a regime to a CSV file."""
    begins = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, ["regime", *rows[0]])
        if begins:
            writer.writeheader()
        writer.writerows({"regime": label} | row for row in rows)


def read(path: Path) -> dict[str, list[dict[str, float]]]:
    """What `keep` wrote, by regime."""
    found: dict[str, list[dict[str, float]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            label = row.pop("regime")
            logical = {"True": 1.0, "False": 0.0}
            numbers = {n: logical[v] if v in logical else float(v) for n, v in row.items()}
            found.setdefault(label, []).append(numbers)
    return found


def report(label: str, rows: list[dict[str, float]]) -> None:
    def column(name: str) -> np.ndarray:
        return np.array([row[name] for row in rows], dtype=float)

    error, estimate, ill = column("error"), column("estimate"), column("ill") > 0
    ratios = np.where(error < SMALLEST, np.maximum(estimate / SMALLEST, 1), estimate / error)
    low, median, high = np.quantile(ratios, [0.05, 0.5, 0.95])
    silent = ratios[~ill] if (~ill).any() else np.ones(1)
    print(
        f"{label:22s} r {np.median(column('ratio')):.2f}  true {np.median(error):6.2%} /"
        f" {np.quantile(error, 0.95):6.2%}  said {np.median(estimate):6.2%}  said / true {low:.2f}"
        f" {median:.2f} {high:.1f}  below 1/3 {np.mean(silent < 1 / 3):.2f}"
        f" ({np.mean(ratios < 1 / 3):.2f}), 1/10 {np.mean(silent < 0.1):.2f}"
        f" ({np.mean(ratios < 0.1):.2f})  ill defined {ill.mean():.2f}  missed"
        f" {1 - column('met').mean():.2f}  cost {column('cost').mean():.2f}",
        flush=True,
    )


def draw(found: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Estimate against truth, one dot a step."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 5), sharex=True, sharey=True)
    limits = (1e-5, 1.5)
    for title, place, prefixes in zip(
        ("cross-entropy", "squared error"), axes, (("ce", "crossing"), ("mse", "edge")), strict=True
    ):
        rows = [row for label, each in found.items() if label.startswith(prefixes) for row in each]
        for ill, colour, name in (
            (0, "#0072B2", "well defined"),
            (1, "#D55E00", "said: ill defined"),
        ):
            chosen = [row for row in rows if bool(row["ill"]) == bool(ill)]
            place.scatter(
                [max(row["error"], limits[0]) for row in chosen],
                [max(row["estimate"], limits[0]) for row in chosen],
                s=3,
                alpha=0.35,
                linewidths=0,
                color=colour,
                label=f"{name} ({len(chosen):,} steps)",
            )
        for factor, style in ((1, "-"), (1 / 3, "--"), (1 / 10, ":"), (3, "--")):
            place.plot(limits, [factor * x for x in limits], style, color="0.4", lw=0.8)
        place.set(xscale="log", yscale="log", xlim=limits, ylim=limits, title=title)
        place.set_xlabel("true error of the projected gradient")
        place.legend(loc="upper left", markerscale=4, frameon=False)
    axes[0].set_ylabel("estimated error")
    figure.savefig(path, dpi=160, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    main()
