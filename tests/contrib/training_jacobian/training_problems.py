"""Training runs whose ends and derivatives are known without the package, shared by tests."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tests.dense import flat_loss, gradient
from tests.networks import Case
from thalweg.loss.objective import Objective

BATCHES = [torch.arange(start, start + 4) for start in (0, 4, 7)] * 3
HEAVY_BALL = {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.05}


def rate(step: int) -> float:
    return 0.1 * (1 + math.cos(math.pi * step / len(BATCHES)))


def mlp() -> Case:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2))
    return Case(model, nn.MSELoss(), (torch.randn(11, 2), torch.randn(11, 2)))


def objective_of(case: Case) -> Objective:
    return Objective(case.model, case.loss, case.data, vectorize_up_to=64)


def trained_by_torch(case: Case, start: Tensor, **settings: float) -> Tensor:
    """theta_T of `torch.optim.SGD` from another theta_0: shares no code with what is tested."""
    theta = start.clone()
    optimizer = torch.optim.SGD([theta], lr=1.0, **settings)  # type: ignore[arg-type]
    for step, batch in enumerate(BATCHES):
        theta.grad = gradient(flat_loss(case, rows=batch), theta)
        optimizer.param_groups[0]["lr"] = rate(step)
        optimizer.step()
    return theta


class Quadratic(nn.Module):
    """The mean over samples i of (1/2) theta^T H_i theta."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))

    def forward(self, matrices: Tensor) -> Tensor:
        return torch.einsum("i,nij,j->n", self.theta, matrices, self.theta).mean() / 2


def hessians() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(5, 3, 3, generator=generator, dtype=torch.float64)
    return factors @ factors.transpose(1, 2) / 3
