"""Does memory suffice for a chunk of samples? Where it does not, half a chunk is tried, and kept.

How much one chunk takes depends on the model and on what is computed, and is known only by trying.
A sum over chunks is the same for every chunk size, up to rounding.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sized
from typing import Protocol, TypeVar

import torch

from thalweg.errors import level_of_caller

Result = TypeVar("Result")

# What a CPU says, and what libraries on a GPU say that ask for memory themselves.
SIGNS = ("can't allocate memory", "CUDA error: out of memory", "_STATUS_ALLOC_FAILED")


class ChunkHalved(UserWarning):
    """Memory did not suffice for a chunk of samples; from now on smaller ones are used.

    Example:
        >>> import warnings
        >>> warnings.simplefilter("error", ChunkHalved)  # stop, where you would rather know
    """


class GraphsRebuilt(UserWarning):
    """Memory did not suffice to hold the graphs of all chunks: products build them anew each time.

    Example:
        >>> import warnings
        >>> warnings.simplefilter("error", GraphsRebuilt)  # stop, where you would rather know
    """


class InChunks(Protocol):
    """Protocol of what is computed chunk by chunk, such as an `Objective`."""

    def explained(self, error: Exception) -> Exception | None:
        """What to raise for an error of torch's or Python's; None to let it pass."""
        ...

    chunk_size: int | None

    @property
    def samples(self) -> Sized:
        """Those of this process: none of its chunks has more."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the memory is."""
        ...


def within_memory(chunked: InChunks, compute: Callable[[], Result]) -> Result:
    """The result of a computation in chunks; out of memory, again with chunks half as large.

    Args:
        chunked: whose `chunk_size` the computation uses; it is set anew.
        compute: the computation, from its beginning.

    Raises:
        InvalidInput: torch or Python raised an error inside of model or loss: see `failures.py`.

    Warns:
        ChunkHalved: the chunk size that is used from now on.
    """
    while True:
        try:
            return compute()
        except Exception as error:
            size = min(chunked.chunk_size or len(chunked.samples), len(chunked.samples))
            memory = isinstance(error, (RuntimeError, MemoryError)) and is_out_of_memory(error)
            if size == 1 or not memory:
                explained = None if memory else chunked.explained(error)
                if explained is None:
                    raise
                raise explained from error
        # Outside of the handler, whose traceback would keep the graph alive.
        chunked.chunk_size = (size + 1) // 2
        if chunked.device.type == "cuda":
            torch.cuda.empty_cache()
        warnings.warn(
            f"out of memory with chunks of {size} samples: {chunked.chunk_size} from now on",
            ChunkHalved,
            stacklevel=level_of_caller(),
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice, be it by its class or by its words."""
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or any(sign in str(error) for sign in SIGNS)
