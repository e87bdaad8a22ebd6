"""Where sums over samples are closed: partial sums of one process become those of all.

A mean over N samples is a sum of parts, each weighted by its fraction of the whole. `Objective`
sums over the chunks of the samples that it holds, and gives every such sum (values, gradients,
products, weights) to its `Reduction`, here and nowhere else. In one process nothing is left to add;
where the samples are divided among processes, another class with these members adds the parts.

A process that fails between two sums (a bad sample, a NaN in its own samples, out of memory) must
not leave the others waiting in the next. So what is computed on the way to a sum is computed by
`sums`: a process that fails brings NaN in the place of its part, which makes the whole NaN in all
processes alike; then all exchange what happened, and all raise the same. Where none fails, that
costs nothing: no further message, and a look at one number.

Example:
    >>> import torch
    >>> reduction = Reduction()
    >>> reduction.sum(torch.ones(2)).tolist(), reduction.total(3.0), reduction.place(5)
    ([1.0, 1.0], 3.0, (0, 5))
"""

from __future__ import annotations

import math
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from thalweg import errors
from thalweg.errors import InvalidInput, ProcessLost, ThalwegError, invalid, without_controls
from thalweg.loss.guards.memory import is_out_of_memory

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

LONGEST = 4096
"""Bytes of what processes tell one another, such as the message of an error."""
LOST = re.compile(r"peer|[Tt]im(ed ?|e)out|Broken pipe|[Ss]ocket|[Cc]onnect")
"""In what libraries say where another process is gone."""


class ProcessFailed(ThalwegError):
    """An error in one process of a group, raised in all of them; the message names its rank."""


class ProcessOutOfMemory(ProcessFailed, MemoryError):
    """Memory did not suffice in one process of a group; raised in all of them."""


class Reduction:
    """Closes sums in one process, which holds all samples. Example: see the module.

    A class for many processes overrides `sum`, `total` and `place`, and `gathered` where all are to
    hear what one says. They call each in the same order.
    """

    rank = 0
    """The number of this process among those of the group."""

    def sum(self, partial: Tensor) -> Tensor:
        """The sum of the processes' tensors of one shape; it may overwrite the one given."""
        return partial

    def close(self, partial: Tensor) -> Tensor:
        """The sum of the processes' values (), or of long vectors (..., P) perhaps a part."""
        return self.sum(partial)

    def total(self, partial: float) -> float:
        """The sum of the processes' numbers."""
        return partial

    def anywhere(self, here: bool) -> bool:
        """Whether something is true in any of the processes."""
        return self.total(float(here)) > 0

    def place(self, count: int) -> tuple[int, int]:
        """Where the `count` samples of this process stand among all.

        Returns:
            How many samples come before them, and the number N of all. Indices of samples count
            through all processes.
        """
        return 0, count

    def gathered(self, text: str) -> list[str]:
        """The texts of all processes in the order of their ranks, each cut to `LONGEST` bytes."""
        return [text]

    def sums(self, compute: Callable[[], tuple[Tensor, ...]], like: Tensor) -> tuple[Tensor, ...]:
        """The sums over processes of each of some tensors; where one fails, all raise.

        Args:
            compute: gives those of this process. No other sum is closed in it.
            like: the shape, dtype and device of the first.

        Raises:
            Exception: what `compute` raises in this process; of several processes, see `settle`.
        """
        return tuple(map(self.close, compute()))

    def total_of(self, compute: Callable[[], float]) -> float:
        """The sum of what each process computes; where one fails, all raise. See `sums`."""
        return self.total(compute())

    @contextmanager
    def together(self) -> Iterator[None]:
        """Where the block fails in one process, all raise: for what is done once.

        Costs an exchange; no sum is closed in the block.
        """
        failure = None
        try:
            yield
        except Exception as error:
            failure = error
        self.settle(failure)

    def settle(self, failure: Exception | None) -> None:
        """Come to the others, some with an error: where there is any, all raise the first.

        Raises:
            Exception: this process's own, where it is alone. Of several: the class of the error
                where it is Thalweg's, else `ProcessFailed`; the message names rank and error.
        """
        told = self.gathered("" if failure is None else _told(failure))
        if len(told) == 1 and failure is not None:
            raise failure
        failed = [rank for rank, text in enumerate(told) if text]
        if failed:
            raise _untold(told, failed) from failure

    def require_same(self, what: str, of_this: Callable[[], str], hint: str) -> None:
        """Refuse what must be the same in all processes, and is not. Costs an exchange.

        Args:
            of_this: what it is in this process.

        Raises:
            InvalidInput: "{what}: rank 2 has another than rank 0; {hint}", in all of them.
        """
        if type(self) is Reduction:
            return
        values = self.gathered(of_this())
        if other := [rank for rank, found in enumerate(values) if found != values[0]]:
            raise InvalidInput(f"{what}: rank {other[0]} has another than rank 0; {hint}")


class AcrossProcesses(Reduction):
    """Closes sums over the processes of a `torch.distributed` group, each with its own samples.

    Args:
        group: the processes. All ask the same of their losses, in the same order.

    Attributes:
        num_sums: how many sums this process has closed with the others.
        num_bytes: how many bytes it has brought to them.

    Raises:
        InvalidInput: this process is none of the group.
        ProcessLost: from every method: another process is gone, or did not answer in the group's
            time (`timeout=` of `init_process_group`).
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        if self.rank < 0:
            given = f"one without rank {dist.get_rank()}"
            raise invalid("group", given, "one that this process belongs to")
        self.num_sums = self.num_bytes = 0

    def sum(self, partial: Tensor) -> Tensor:
        """See `Reduction`."""
        whole = partial.contiguous()
        self.num_sums += 1
        self.num_bytes += whole.numel() * whole.element_size()
        with lost_told(self.rank):
            dist.all_reduce(whole, group=self.group)
        return whole

    def total(self, partial: float) -> float:
        """See `Reduction`."""
        return float(self.sum(self._number(partial, torch.float64)))

    def place(self, count: int) -> tuple[int, int]:
        """See `Reduction`."""
        counts = [int(each) for each in self._all(self._number(count, torch.int64))]
        return sum(counts[: self.rank]), sum(counts)

    def gathered(self, text: str) -> list[str]:
        """See `Reduction`."""
        content = text.encode()[:LONGEST].ljust(LONGEST, b"\0")
        own = torch.frombuffer(bytearray(content), dtype=torch.uint8).to(self._device)
        found = [bytes(each.tolist()).rstrip(b"\0") for each in self._all(own)]
        return [each.decode(errors="ignore") for each in found]

    def sums(self, compute: Callable[[], tuple[Tensor, ...]], like: Tensor) -> tuple[Tensor, ...]:
        """See `Reduction`."""
        failure = None
        try:
            parts = compute()
        except Exception as error:
            # What it has held: memory may be what is missing.
            traceback.clear_frames(error.__traceback__)
            failure, parts = error, (torch.full_like(like, math.nan),)
        first = self.close(parts[0])
        # The same bits in all processes, so that all go the same way.
        if not first.numel() or bool(first.reshape(-1)[0].isnan()):
            self.settle(failure)
        return first, *map(self.close, parts[1:])

    def total_of(self, compute: Callable[[], float]) -> float:
        """See `Reduction`."""
        number = self._number(0.0, torch.float64)
        return float(self.sums(lambda: (number + compute(),), number)[0])

    def _all(self, own: Tensor) -> list[Tensor]:
        found = [torch.zeros_like(own) for _ in range(dist.get_world_size(self.group))]
        with lost_told(self.rank):
            dist.all_gather(found, own, group=self.group)
        return found

    def _number(self, value: float, dtype: torch.dtype) -> Tensor:
        return torch.tensor(value, dtype=dtype, device=self._device)

    @property
    def _device(self) -> str:
        """Where the group takes small tensors."""
        return "cuda" if dist.get_backend(self.group) == "nccl" else "cpu"


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


def reduction_in(loss: object) -> Reduction:
    """What closes the sums of a loss; that of one process, where it does not say."""
    found = getattr(loss, "reduction", None)
    return found if isinstance(found, Reduction) else Reduction()


def group_of_all() -> ProcessGroup | None:
    """All processes of `torch.distributed`; None where there is this one alone."""
    return dist.group.WORLD if several_processes() else None


def several_processes() -> bool:
    """Whether `torch.distributed` runs with more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextmanager
def lost_told(rank: int) -> Iterator[None]:
    """Say in one line that another process is gone.

    Raises:
        ProcessLost: it is.
    """
    try:
        yield
    except RuntimeError as error:
        text = " ".join(str(error).split())
        if not isinstance(error, dist.DistError) and not LOST.search(text):
            raise
        # Without the place in the library's source.
        text = re.sub(r"^\[[^]]*\] ", "", text)[:200]
        raise ProcessLost(
            f"rank {rank} has lost another process of its group, which has ended or did not answer"
            f" in time ({text}); start all of them again"
        ) from error


def _told(failure: Exception) -> str:
    """What the others hear of an error: its class and its message."""
    known = isinstance(failure, ThalwegError)
    name = type(failure).__name__
    text = " ".join(without_controls(str(failure)).split()) or "without a message"
    if is_out_of_memory(failure):
        kind = ProcessOutOfMemory
    else:
        kind = type(failure) if known else ProcessFailed
    return f"{kind.__name__}\n{text if known else f'{name}: {text}'}"


def _untold(told: list[str], failed: list[int]) -> ThalwegError:
    """The error that all raise: the first one, and how many there are."""
    rank = failed[0]
    name, text = told[rank].split("\n", 1)
    kind = globals().get(name) or getattr(errors, name, ProcessFailed)
    also = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
    error = kind(f"rank {rank} of {len(told)}{also}: {text}")
    error.of_all = True
    return error
