"""The dominant subspace of a model whose parameters are sharded by FSDP2, and training in the bulk.

Theta, the basis, its products and the tracker's references are parts as the parameters are: two
processes hold half of them each, 1,000 a thousandth. What is printed is the same on every number of
processes, up to rounding.

    torchrun --nproc-per-node 2 examples/sharded_model.py
"""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import thalweg

CLASSES, SAMPLES = 4, 1200
LOSS = nn.MSELoss()


def main() -> None:
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()

    model = in_shards(network().to(kind), kind, ranks)
    inputs, targets = (part.to(kind).tensor_split(ranks)[rank] for part in data())
    objective = thalweg.Objective(model, LOSS, (inputs, targets), group=dist.group.WORLD)

    space = thalweg.top_eigenpairs(objective, k=10)
    rows = space.basis.shape[0]
    tell(rank, f"P = {objective.num_parameters}, here {rows} rows of the basis; k = {space.k}")
    tell(rank, f"eigenvalues {' '.join(f'{value:.3f}' for value in space.eigenvalues.tolist())}")

    tracker = thalweg.SubspaceTracker(objective, k=CLASSES)
    optimizer = thalweg.SplitUpdate(
        torch.optim.SGD(model.parameters(), lr=0.1), tracker, dominant=0.0, bulk=1.0
    )
    for step in range(30):
        optimizer.zero_grad()
        # FSDP takes the mean over processes, of which some may have more samples.
        (LOSS(model(inputs), targets) * (ranks * len(targets) / SAMPLES)).backward()
        optimizer.step()
        if step % 10 == 9:
            loss, sharpness = float(objective.value()), float(tracker.subspace.eigenvalues[0])
            tell(rank, f"step {step + 1:2}  loss {loss:.4f}  sharpness {sharpness:.3f}")
    dist.destroy_process_group()


def network() -> nn.Sequential:
    torch.manual_seed(0)  # the same in all processes, until it is sharded
    middle = nn.Sequential(nn.Linear(32, 32), nn.Tanh())
    return nn.Sequential(nn.Linear(20, 32), nn.Tanh(), middle, nn.Linear(32, CLASSES))


def in_shards(model: nn.Sequential, kind: str, ranks: int) -> nn.Module:
    mesh = init_device_mesh(kind, (ranks,))
    fully_shard(model[2], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    centers = 1 + 0.3 * torch.randn(CLASSES, 20, generator=generator)
    labels = torch.arange(SAMPLES) % CLASSES
    inputs = centers[labels] + torch.randn(SAMPLES, 20, generator=generator)
    return inputs, torch.eye(CLASSES)[labels]


def tell(rank: int, line: str) -> None:
    if rank == 0:
        print(line, flush=True)


if __name__ == "__main__":
    main()
