"""Local SGD: workers that train by themselves, and are averaged now and then.

Two workers take mini-batches of their own and average their parameters after every 8 steps. The
same training runs with both in one process, or, under torchrun, in a process each: the
numbers are the same to the last bit. Gu, Lyu, Huang, Arora 2023 (arXiv 2303.01215).

    python examples/local_sgd.py
    torchrun --nproc-per-node 2 examples/local_sgd.py
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn

from thalweg.contrib import ConstantPeriod, LocalSGD, QuadraticRule, SimulatedWorkers

WORKERS, STEPS, CLASSES = 2, 60, 4
LOSS = nn.CrossEntropyLoss()


def main() -> None:
    if "RANK" in os.environ:  # set by torchrun
        dist.init_process_group("gloo")
        worker = dist.get_rank()
        model = in_a_process(worker)
        if worker == 0:
            print(f"in a process each  loss {loss_of(model):.9f}")
        dist.destroy_process_group()
    else:
        model, schedule = build(), ConstantPeriod(8)
        print(f"at the start       loss {loss_of(model):.9f}")
        optimizers = [sgd(model) for _ in range(WORKERS)]
        workers = SimulatedWorkers(optimizers, schedule, total_steps=STEPS)
        for step in range(STEPS):
            workers.step(lambda worker, step=step: backward(model, step, worker))
        print(f"in one process     loss {loss_of(model):.9f}")
        growing = QuadraticRule(alpha=0.2, minimum=2)
        lengths = [growing.period(lr, step=0) for lr in (0.1, 0.05, 0.025, 0.0125)]
        print(f"rounds by the quadratic rule as the learning rate halves: {lengths}")


def in_a_process(worker: int) -> nn.Module:
    """What each process does: its own mini-batches, and averages by the optimizer."""
    model = build()
    optimizer = LocalSGD(sgd(model), ConstantPeriod(8), total_steps=STEPS)
    for step in range(STEPS):
        backward(model, step, worker)
        optimizer.step()
    return model


def build() -> nn.Module:
    torch.manual_seed(0)  # all workers begin at the same parameters
    return nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, CLASSES))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(1000) % CLASSES
    centers = torch.randn(CLASSES, 20, generator=generator)
    return centers[labels] + torch.randn(1000, 20, generator=generator), labels


INPUTS, LABELS = data()


def backward(model: nn.Module, step: int, worker: int) -> Tensor:
    """The loss on the mini-batch of a worker at a step, and its gradients."""
    generator = torch.Generator().manual_seed(WORKERS * step + worker)
    batch = torch.randint(0, len(INPUTS), (16,), generator=generator)
    model.zero_grad()
    loss = LOSS(model(INPUTS[batch]), LABELS[batch])
    loss.backward()
    return loss


def loss_of(model: nn.Module) -> float:
    with torch.no_grad():
        return float(LOSS(model(INPUTS), LABELS))


if __name__ == "__main__":
    main()
