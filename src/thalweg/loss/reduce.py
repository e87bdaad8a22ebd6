"""Where sums over samples are closed: partial sums of one process become those of all.

A mean over N samples is a sum of parts, each weighted by its fraction of the whole. `Objective`
sums over the chunks of the samples that it holds, and gives every such sum (values, gradients,
products, weights) to its `Reduction`, here and nowhere else. In one process nothing is left to add;
where the samples are divided among processes, another class with these members adds the parts.

Example:
    >>> import torch
    >>> reduction = Reduction()
    >>> reduction.sum(torch.ones(2)).tolist(), reduction.total(3.0), reduction.place(5)
    ([1.0, 1.0], 3.0, (0, 5))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from thalweg.errors import InvalidInput

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Reduction:
    """Closes sums in one process, which holds all samples. Example: see the module.

    A class for many processes overrides all three. They call each in the same order.
    """

    def sum(self, partial: Tensor) -> Tensor:
        """The sum of the processes' tensors of one shape; it may overwrite the one given."""
        return partial

    def total(self, partial: float) -> float:
        """The sum of the processes' numbers."""
        return partial

    def place(self, count: int) -> tuple[int, int]:
        """Where the `count` samples of this process stand among all.

        Returns:
            How many samples come before them, and the number N of all. Indices of samples count
            through all processes.
        """
        return 0, count


class AcrossProcesses(Reduction):
    """Closes sums over the processes of a `torch.distributed` group, each with its own samples.

    Args:
        group: the processes. All ask the same of their losses, in the same order.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group

    def sum(self, partial: Tensor) -> Tensor:
        """See `Reduction`."""
        whole = partial.contiguous()
        dist.all_reduce(whole, group=self.group)
        return whole

    def total(self, partial: float) -> float:
        """See `Reduction`."""
        return float(self.sum(self._number(partial, torch.float64)))

    def place(self, count: int) -> tuple[int, int]:
        """See `Reduction`."""
        own = self._number(count, torch.int64)
        counts = [torch.zeros_like(own) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(counts, own, group=self.group)
        before = counts[: dist.get_rank(self.group)]
        return int(sum(map(int, before))), int(sum(map(int, counts)))

    def _number(self, value: float, dtype: torch.dtype) -> Tensor:
        on_gpu = dist.get_backend(self.group) == "nccl"
        return torch.tensor(value, dtype=dtype, device="cuda" if on_gpu else "cpu")


def reduction_of(group: ProcessGroup | Literal["ask"] | None) -> Reduction:
    """How sums are closed over a group; None for this process alone.

    Raises:
        InvalidInput: "ask", where `torch.distributed` runs with several processes: is the loss that
            of this process's samples, or of all?
    """
    if group == "ask":
        if several_processes():
            raise InvalidInput(
                f"group: torch.distributed runs with {dist.get_world_size()} processes; give"
                " group=torch.distributed.group.WORLD for the loss over the samples of all, or"
                " group=None for that of this process's samples alone"
            )
        return Reduction()
    return Reduction() if group is None else AcrossProcesses(group)


def several_processes() -> bool:
    """Whether `torch.distributed` runs with more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
