"""One small training by several workers, the same in processes and in one process."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from thalweg.contrib.averaging_period import AveragingPeriod, ConstantPeriod, QuadraticRule
from thalweg.contrib.local_sgd import LocalSGD
from thalweg.contrib.simulated_workers import SimulatedWorkers
from thalweg.errors import InvalidInput

STEPS, BATCH = 11, 6
INPUTS = torch.linspace(-1, 1, 360).reshape(120, 3).sin()
TARGETS = torch.linspace(1, 0, 240).reshape(120, 2).cos()
#: Optimizer, schedule: settings that need nothing of the test's own module to be rebuilt.
CASES: dict[str, tuple[str, AveragingPeriod]] = {
    "sgd": ("sgd", ConstantPeriod(4)),
    "momentum": ("momentum", ConstantPeriod(3)),
    "adamw, growing rounds": ("adamw", QuadraticRule(alpha=0.04, minimum=2)),
}


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def build(kind: str, model: nn.Module) -> Optimizer:
    if kind == "adamw":
        return AdamW(model.parameters(), lr=0.02)
    return SGD(model.parameters(), lr=0.1, momentum=0.9 if kind == "momentum" else 0.0)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def batch(step: int, worker: int) -> Tensor:
    return (torch.arange(BATCH) * 7 + 5 * step + 31 * worker) % 120


def backward(model: nn.Module, samples: Tensor) -> Tensor:
    model.zero_grad()
    loss = nn.functional.mse_loss(model(INPUTS[samples]), TARGETS[samples])
    loss.backward()
    return loss


def with_decay(optimizer: Optimizer, step: int) -> None:
    """The learning rate falls, so that rounds of the quadratic rule grow: 4, then 7 (cut)."""
    for group in optimizer.param_groups:
        group["lr"] = (0.02 if "betas" in group else 0.1) / (1 + step / 8)


def simulated(name: str, workers: int) -> Tensor:
    """The model's parameters, the mean over workers, after each step (steps, P)."""
    kind, schedule = CASES[name]
    model = network()
    optimizer = SimulatedWorkers([build(kind, model) for _ in range(workers)], schedule, STEPS)
    found = []
    for step in range(STEPS):
        with_decay(optimizer, step)
        optimizer.step(closure_of(model, step))
        found.append(flat(model))
    return torch.stack(found)


def closure_of(model: nn.Module, step: int) -> Callable[[int], Tensor]:
    return lambda worker: backward(model, batch(step, worker))


def in_processes(folder: Path, workers: int) -> list[dict[str, Tensor]]:
    """What each worker's own parameters are after each step, by case (steps, P)."""
    processes.spawn(_work, (str(folder), workers), nprocs=workers)  # type: ignore[arg-type]
    return [torch.load(folder / f"{worker}.pt") for worker in range(workers)]


def _work(worker: int, folder: str, workers: int) -> None:
    torch.set_num_threads(1)
    with group(Path(folder) / "store", worker, workers):
        found = {name: _train(name, worker) for name in CASES}
        found["refused"] = torch.tensor(_is_refused(worker))
        torch.save(found, Path(folder) / f"{worker}.pt")


def _train(name: str, worker: int) -> Tensor:
    kind, schedule = CASES[name]
    model = network()
    optimizer = LocalSGD(build(kind, model), schedule, STEPS)
    found = []
    for step in range(STEPS):
        with_decay(optimizer, step)
        backward(model, batch(step, worker))
        optimizer.step()
        found.append(flat(model))
    return torch.stack(found)


def _is_refused(worker: int) -> bool:
    """Whether this worker is told that they begin at different parameters."""
    model = network(seed=worker)
    optimizer = LocalSGD(build("sgd", model), ConstantPeriod(2))
    backward(model, batch(0, worker))
    try:
        optimizer.step()
    except InvalidInput:
        return True
    return False


@contextlib.contextmanager
def group(store: Path, worker: int = 0, workers: int = 1) -> Iterator[None]:
    """A process group through a file."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=worker, world_size=workers)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """A process group of this process only."""
    with tempfile.TemporaryDirectory() as folder, group(Path(folder) / "store"):
        yield
