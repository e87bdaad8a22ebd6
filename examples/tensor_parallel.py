"""Tensor parallel: layers are computed by several processes together, and watched meanwhile.

The inner layer of each block is cut by `parallelize_module`, by rows and then by columns. Products
with the Hessian are differences of gradients then, as second derivatives through such layers are
wrong. In one process they are exact, and the same numbers come out, to the digits printed.

    python examples/tensor_parallel.py
    torchrun --nproc-per-node 2 examples/tensor_parallel.py
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import thalweg

STEPS, CLASSES, WIDTH = 20, 4, 16
LOSS = nn.CrossEntropyLoss()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + self.down(nn.functional.gelu(self.up(self.norm(inputs))))


def main() -> None:
    several = "RANK" in os.environ  # set by torchrun
    if several:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, count = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    kind = "cuda" if several and torch.cuda.is_available() else "cpu"
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))

    model, rows = trained(kind, count, watched=True)
    left, _ = trained(kind, count, watched=False)
    same = all(map(torch.equal, parts(model), parts(left)))

    inputs, labels = data(kind)
    group = dist.group.WORLD if several else None
    objective = thalweg.Objective(model, LOSS, (inputs, labels), group=group)
    space = thalweg.top_eigenpairs(objective, k=CLASSES - 1)
    if rank == 0:
        here = sum(part.numel() for part in parts(model))
        print(f"{count} processes, P = {objective.num_parameters}, parameters here: {here}")
        print("product    ", objective.product, objective.choice.reason)
        print("loss       ", *(f"{row['loss']:.9f}" for row in rows))
        print("sharpness  ", *(f"{row['sharpness']:.3f}" for row in rows))
        print("eigenvalues", *(f"{value:.6f}" for value in space.eigenvalues.tolist()))
        print("watched and not, bit for bit the same:", "yes" if same else "no")
    if several:
        dist.destroy_process_group()


def trained(kind: str, count: int, *, watched: bool) -> tuple[nn.Module, list[dict]]:
    """The model after its training, and the rows that were measured."""
    torch.manual_seed(0)  # the same in all processes, until it is cut
    model = nn.Sequential(nn.Linear(20, WIDTH), Block(), Block(), nn.Linear(WIDTH, CLASSES))
    model = model.double().to(kind)
    if count > 1:
        plan = {f"{block}.up": ColwiseParallel() for block in (1, 2)}
        plan |= {f"{block}.down": RowwiseParallel() for block in (1, 2)}
        parallelize_module(model, init_device_mesh(kind, (count,)), plan)
    inputs, labels = data(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    watcher = None
    if watched:
        group = dist.group.WORLD if count > 1 else None
        options = {"k": CLASSES - 1, "every": 10, "quiet": True, "group": group}
        watcher = thalweg.watch(model, LOSS, (inputs, labels), optimizer, **options)
    for _ in range(STEPS):
        optimizer.zero_grad()
        LOSS(model(inputs), labels).backward()
        optimizer.step()
    if watcher is None:
        return model, []
    watcher.close()
    return model, watcher.history


def data(kind: str) -> tuple[Tensor, Tensor]:
    """All samples: the processes of a tensor parallel model have the same."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(400) % CLASSES
    centers = torch.randn(CLASSES, 20, generator=generator)
    inputs = centers[labels] + torch.randn(400, 20, generator=generator)
    return inputs.double().to(kind), labels.to(kind)


def parts(model: nn.Module) -> list[Tensor]:
    """What this process holds of the parameters."""
    held = [parameter.detach() for parameter in model.parameters()]
    return [part.to_local() if hasattr(part, "to_local") else part for part in held]


if __name__ == "__main__":
    main()
