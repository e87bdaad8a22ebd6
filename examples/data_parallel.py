"""Data parallel: each process holds a part of the samples, and all see the curvature of the whole.

The model trains in `DistributedDataParallel`, and is watched as in one process; then the top
eigenvalues over the samples of all are solved for. In one process the same numbers come out, but
for rounding.

    python examples/data_parallel.py
    torchrun --nproc-per-node 2 examples/data_parallel.py
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import thalweg

STEPS, CLASSES = 60, 4
LOSS = nn.CrossEntropyLoss()


def main() -> None:
    several = "RANK" in os.environ  # set by torchrun
    if several:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, count = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    group = dist.group.WORLD if several else None
    device = torch.device("cuda", rank) if several and torch.cuda.is_available() else "cpu"

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, CLASSES)).to(device).double()
    parallel = DistributedDataParallel(model) if several else model
    inputs, targets = (part.to(device) for part in shard(rank, count))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    options = {"k": CLASSES - 1, "every": 20, "group": group}
    with thalweg.watch(parallel, LOSS, (inputs, targets), optimizer, **options) as watcher:
        for _ in range(STEPS):
            optimizer.zero_grad()
            LOSS(parallel(inputs), targets).backward()
            optimizer.step()

    objective = thalweg.Objective(model, LOSS, (inputs, targets), group=group)
    space = thalweg.eigenpairs(objective, k=CLASSES - 1)
    if rank == 0:
        print(f"{count} processes, N = {objective.num_samples}")
        print("loss       ", *(f"{row['loss']:.9f}" for row in watcher.history))
        print("sharpness  ", *(f"{row['sharpness']:.3f}" for row in watcher.history))
        print("eigenvalues", *(f"{value:.9f}" for value in space.eigenvalues.tolist()))
    if several:
        dist.destroy_process_group()


def shard(rank: int, count: int) -> tuple[Tensor, Tensor]:
    """This process's part of the samples."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(1200) % CLASSES
    centers = torch.randn(CLASSES, 20, generator=generator)
    inputs = centers[labels] + torch.randn(1200, 20, generator=generator)
    return inputs.double().tensor_split(count)[rank], labels.tensor_split(count)[rank]


if __name__ == "__main__":
    main()
