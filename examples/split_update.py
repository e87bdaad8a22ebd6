"""SGD, and SGD whose updates are kept in the dominant subspace (Dom) or out of it (Bulk).

All three go on from the same parameters with the same mini-batches. Most of the gradient lies in
the dominant subspace, yet it is the rest that brings the loss down: Song, Ahn, Yun 2025
(arXiv 2405.16002). Any optimizer of torch can be wrapped in this way.

    python examples/split_update.py
"""

import copy

import torch
from torch import Tensor, nn

import thalweg

CLASSES = 4
SHARES = {"SGD": (1.0, 1.0), "Dom-SGD": (1.0, 0.0), "Bulk-SGD": (0.0, 1.0)}


def main() -> None:
    torch.manual_seed(0)
    centers = 1 + 0.3 * torch.randn(CLASSES, 20)
    labels = torch.arange(1000) % CLASSES
    data = centers[labels] + torch.randn(1000, 20), torch.eye(CLASSES)[labels]
    model = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, CLASSES))
    train(model, data, steps=300)
    print(f"after the common start    loss {thalweg.Objective(model, LOSS, data).value():.4f}")
    for name, (dominant, bulk) in SHARES.items():
        branch = copy.deepcopy(model)
        objective = train(branch, data, steps=120, dominant=dominant, bulk=bulk)
        print(f"{name:8} 120 steps later  loss {objective.value():.4f}")


LOSS = nn.MSELoss()


def train(
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    steps: int,
    dominant: float = 1.0,
    bulk: float = 1.0,
) -> thalweg.Objective:
    """Train with both parts of each update scaled; (1, 1) is plain SGD, bit for bit."""
    objective = thalweg.Objective(model, LOSS, data)
    tracker = thalweg.SubspaceTracker(objective, k=CLASSES)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = thalweg.SplitUpdate(base, tracker, dominant, bulk)
    batches = torch.Generator().manual_seed(1)
    for _ in range(steps):
        batch = torch.randint(0, len(data[0]), (50,), generator=batches)
        optimizer.zero_grad()
        LOSS(model(data[0][batch]), data[1][batch]).backward()
        optimizer.step()
    return objective


if __name__ == "__main__":
    main()
