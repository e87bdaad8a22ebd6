"""Every optimizer on the CPU and on a GPU: where it goes, and on from where it was saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from torch.optim import SGD, Adam, AdamW, Muon, Optimizer

from tests.optim.resuming import save_and_restore
from tests.sampling import few
from thalweg.contrib.blockwise import blockwise_groups
from thalweg.contrib.dion import Dion
from thalweg.contrib.grad_power import GradPower
from thalweg.contrib.subspace_langevin import SubspaceLangevin
from thalweg.loss.objective import Objective
from thalweg.optim.combined import Combined
from thalweg.optim.sam import SAM
from thalweg.optim.split import SplitUpdate
from thalweg.tracking.tracker import SubspaceTracker

INPUTS = torch.linspace(-1, 1, 120, dtype=torch.float64).reshape(40, 3).sin()
TARGETS = torch.linspace(1, 0, 80, dtype=torch.float64).reshape(40, 2).cos()

BASES: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "SGD": lambda p: SGD(p, lr=0.1, momentum=0.9),
    "Adam": lambda p: Adam(p, lr=0.01),
    "Muon": lambda p: Muon(p, lr=0.02),
}
OTHERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "SGD": BASES["SGD"],
    "Adam": BASES["Adam"],
    "SAM": lambda p: SAM(SGD(p, lr=0.1), rho=0.1),
    "adaptive SAM": lambda p: SAM(Adam(p, lr=0.01), rho=0.5, adaptive=True),
    "Dion": lambda p: Dion(p, lr=0.05, rank=1),
    "powers": lambda p: GradPower(Adam(p, lr=0.01), power=1.2, eps=1e-8),
    "several": lambda p: Combined([Dion(p[:1], lr=0.05), AdamW(p[1:], lr=0.01)]),
    "Langevin": lambda p: SubspaceLangevin(p, lr=0.01, temperature=0.1),
    "by block": lambda p: SGD(
        blockwise_groups([("mlp", p[0]), ("norm", p[1])], lr=0.01), momentum=0.9
    ),
}


def network(device: torch.device, dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2, bias=False)
    return nn.Sequential(*layers).to(device, dtype)


def data(model: nn.Module) -> tuple[Tensor, Tensor]:
    like = next(model.parameters())
    return INPUTS.to(like), TARGETS.to(like)


def make_step(model: nn.Module, optimizer: Optimizer, step: int) -> None:
    inputs, targets = data(model)
    rows = (torch.arange(10) * 7 + step) % 40

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = nn.functional.mse_loss(model(inputs[rows]), targets[rows])
        value.backward()
        return value

    loss()
    needs_closure = getattr(optimizer, "needs_closure", False)
    optimizer.step(*([loss] if needs_closure else []))  # type: ignore[arg-type]


def tracker(model: nn.Module) -> SubspaceTracker:
    objective = Objective(model, nn.MSELoss(), data(model), vectorize_up_to=0)
    return SubspaceTracker(objective, 2, gap_every=0)


@pytest.mark.parametrize("name", OTHERS)
def test_an_optimizer_goes_where_it_goes_on_the_cpu(name: str, device: torch.device) -> None:
    ends = []
    for place in (torch.device("cpu"), device):
        model = network(place, torch.float64)
        begin = parameters_to_vector(model.parameters()).clone()
        optimizer = OTHERS[name](list(model.parameters()))
        for step in range(5):
            make_step(model, optimizer, step)
        ends.append((parameters_to_vector(model.parameters()) - begin).detach().cpu())
    assert torch.allclose(*ends, rtol=1e-8, atol=1e-10)
    assert float(ends[0].norm()) > 1e-3


@pytest.mark.parametrize("name", BASES)
def test_the_dominant_and_the_bulk_update_add_up_to_the_full_one(
    name: str, device: torch.device
) -> None:
    made: dict[tuple[float, float], Tensor] = {}
    for factors in ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0)):
        model = network(device, torch.float64)
        begin = parameters_to_vector(model.parameters()).detach().clone()
        split = SplitUpdate(BASES[name](list(model.parameters())), tracker(model), *factors)
        make_step(model, split, 0)
        made[factors] = parameters_to_vector(model.parameters()).detach() - begin
        if split.split is not None:
            assert split.split.dominant.device == device
    dominant, bulk = made[1.0, 0.0], made[0.0, 1.0]
    assert torch.allclose(dominant + bulk, made[1.0, 1.0], atol=1e-12)
    assert float(dominant.norm()) > 0
    assert float(bulk.norm()) > 0
    assert abs(float(dominant @ bulk)) < 1e-9 * float(dominant.norm() * bulk.norm())


@pytest.mark.parametrize("name", few(3, ["split", "Muon", *OTHERS]))
def test_a_restored_optimizer_goes_on_bit_for_bit(name: str, device: torch.device) -> None:
    def build() -> tuple[nn.Module, Optimizer]:
        model = network(device, torch.float32)
        if name == "split":
            base = SGD(model.parameters(), lr=0.1, momentum=0.9)
            return model, SplitUpdate(base, tracker(model), 0.0, 1.0)
        make: dict[str, Callable[[list[nn.Parameter]], Any]] = {**BASES, **OTHERS}
        return model, make[name](list(model.parameters()))

    def step(model: nn.Module, optimizer: Optimizer, number: int) -> None:
        if isinstance(optimizer, SplitUpdate):
            # Its source is saved apart: here it is taken anew.
            optimizer.source = tracker(model)
        make_step(model, optimizer, number)

    save_and_restore(build, step)
