"""What does an optimizer's step cost beside that of its base?

One process, one model (the digits' multilayer perceptron, or a wider one), one fixed mini-batch,
whose loss and gradient are evaluated anew for each step. Time is that of the processor, on one
thread, and optimizers take turns, so that what else the machine does hardly counts; of the turns
the fastest one is taken.

    step       milliseconds of a whole training step: gradient and update
    update     of those, milliseconds of the update alone, as the step less one without an update
    step / base    step over that of the optimizer named beside it

    python benchmarks/optimizers.py
    python benchmarks/optimizers.py --width 500 --batch-size 200 --turns 20
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Muon, Optimizer

from thalweg.contrib.dion import Dion
from thalweg.contrib.grad_power import GradPower
from thalweg.loss.objective import Objective
from thalweg.optim.combined import Combined
from thalweg.optim.sam import SAM
from thalweg.optim.split import SplitUpdate
from thalweg.problems.data.digits import Digits
from thalweg.spectrum.subspace import random_subspace
from thalweg.tracking.gradient_subspaces import GradientSubspace, UpdateSubspace
from thalweg.tracking.source import FixedSubspace
from thalweg.tracking.tracker import SubspaceTracker
from thalweg.tracking.wrapping import needs_closure

Build = Callable[["Training"], Optimizer]


@dataclass
class Training:
    """A model with a mini-batch of its own: (batch, 64) inputs, (batch, 10) targets."""

    model: nn.Module
    inputs: Tensor
    targets: Tensor
    data: tuple[Tensor, Tensor]
    loss: nn.Module = field(default_factory=nn.MSELoss)

    def evaluate(self) -> Tensor:
        """Loss and gradient of the mini-batch."""
        self.model.zero_grad()
        loss = self.loss(self.model(self.inputs), self.targets)
        loss.backward()
        return loss

    def matrices(self) -> list[nn.Parameter]:
        """The parameters that Muon and Dion take."""
        return [p for p in self.model.parameters() if p.ndim == 2]

    def with_companion(self, optimizer: Optimizer) -> Optimizer:
        """The optimizer of the matrices, with AdamW for the rest."""
        return Combined([optimizer, AdamW([p for p in self.model.parameters() if p.ndim != 2])])


def sgd(training: Training) -> Optimizer:
    """Plain SGD; steps of no size, here and below, so that all see the same point."""
    return SGD(training.model.parameters(), lr=1e-6)


def adam(training: Training) -> Optimizer:
    """Adam."""
    return Adam(training.model.parameters(), lr=1e-6)


def muon(training: Training) -> Optimizer:
    """Muon, with AdamW for the biases."""
    return training.with_companion(Muon(training.matrices(), lr=1e-6))


def dion(fraction: float) -> Build:
    """Dion at a fraction of the full rank, with AdamW for the biases."""

    def build(training: Training) -> Optimizer:
        own = Dion(training.matrices(), lr=1e-6, rank_fraction=fraction)
        return training.with_companion(own)

    return build


def fixed_split(training: Training) -> Optimizer:
    """Bulk-SGD on a subspace that stays: what the split itself costs."""
    total = sum(p.numel() for p in training.model.parameters())
    source = FixedSubspace(random_subspace(total, 10, 0))
    parameters = list(training.model.parameters())
    return SplitUpdate(sgd(training), source, 0.0, 1.0, parameters=parameters)


def tracked_split(training: Training) -> Optimizer:
    """Bulk-SGD on the top 10 eigenvectors of the Hessian over all data, followed."""
    objective = Objective(training.model, training.loss, training.data)
    return SplitUpdate(sgd(training), SubspaceTracker(objective, 10), 0.0, 1.0)


def on_updates(training: Training) -> Optimizer:
    """Adam with its bulk scaled up, on 4 principal directions of each tensor's last 16 updates."""
    parameters = list(training.model.parameters())
    source = UpdateSubspace(4, window=16, every=20, blocks=[p.numel() for p in parameters])
    return SplitUpdate(adam(training), source, 1.0, 2.0, parameters=parameters)


def on_gradients(training: Training) -> Optimizer:
    """The same on 4 principal directions of each tensor's gradients, those of 16 samples."""
    objective = Objective(training.model, training.loss, training.data)
    blocks = objective.layout.sizes
    source = GradientSubspace(objective, 4, samples=16, every=20, blocks=blocks)
    return SplitUpdate(adam(training), source, 1.0, 2.0)


CASES: Sequence[tuple[str, str, Build]] = (
    ("sgd", "sgd", sgd),
    ("adam", "adam", adam),
    ("muon", "muon", muon),
    ("sgd, power 1.2", "sgd", lambda training: GradPower(sgd(training))),
    ("adam, power 1.2", "adam", lambda training: GradPower(adam(training))),
    ("muon, power 1.2", "muon", lambda training: GradPower(muon(training))),
    ("dion, rank 1", "muon", dion(1.0)),
    ("dion, rank 1/2", "muon", dion(0.5)),
    ("dion, rank 1/4", "muon", dion(0.25)),
    ("dion, rank 1/8", "muon", dion(0.125)),
    ("sam", "sgd", lambda training: SAM(sgd(training))),
    ("bulk-sgd, fixed", "sgd", fixed_split),
    ("bulk-sgd, tracked", "sgd", tracked_split),
    ("adam, on updates", "adam", on_updates),
    ("adam, on gradients", "adam", on_gradients),
)
"""Name, the base that it is compared with, and how it is built."""


def make_training(width: int, batch_size: int) -> Training:
    """A perceptron with two hidden layers on the digits, the same weights each time."""
    torch.manual_seed(0)
    sizes = (64, width, width, 10)
    layers = [nn.Linear(*pair) for pair in pairwise(sizes)]
    model = nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])
    samples = Digits().build()
    inputs = torch.as_tensor(samples.train_inputs).float().reshape(-1, 64) / 16
    targets = nn.functional.one_hot(torch.as_tensor(samples.train_labels).long(), 10).float()
    return Training(model, inputs[:batch_size], targets[:batch_size], (inputs, targets))


def seconds_of_a_step(training: Training, optimizer: Optimizer | None, steps: int) -> float:
    """Processor time, mean over some steps in a row; None: the gradient alone."""
    begin = time.process_time()
    for _ in range(steps):
        training.evaluate()
        if optimizer is None:
            continue
        if needs_closure(optimizer):
            optimizer.step(training.evaluate)  # type: ignore[arg-type]
        else:
            optimizer.step()
    return (time.process_time() - begin) / steps


def fastest_turns(width: int, batch_size: int, turns: int, steps: int) -> dict[str, float]:
    """Seconds of a step by case; "" is the gradient alone."""
    bare = make_training(width, batch_size)
    entrants: dict[str, tuple[Training, Optimizer | None]] = {"": (bare, None)}
    for name, _, build in CASES:
        training = make_training(width, batch_size)
        entrants[name] = training, build(training)
    best = dict.fromkeys(entrants, float("inf"))
    # The first turn is for warming up: states are made, subspaces solved.
    for turn in range(turns + 1):
        for name, (training, optimizer) in entrants.items():
            seconds = seconds_of_a_step(training, optimizer, steps)
            if turn > 0:
                best[name] = min(best[name], seconds)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description="cost of a step, by optimizer")
    parser.add_argument("--width", type=int, default=100, help="of both hidden layers")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--steps", type=int, default=20, help="in each turn")
    options = parser.parse_args()
    torch.set_num_threads(1)
    best = fastest_turns(options.width, options.batch_size, options.turns, options.steps)
    print(f"{'':18} {'step, ms':>9} {'update, ms':>11} {'step / base':>12}  base")
    for name, base, _ in CASES:
        step, update = 1e3 * best[name], 1e3 * (best[name] - best[""])
        print(f"{name:18} {step:9.3f} {update:11.3f} {best[name] / best[base]:12.2f}  {base}")


if __name__ == "__main__":
    main()
