"""Which samples are in a mini-batch: a function of (seed, step) alone.

The samples of every epoch are put in a random order; the orders follow one another without end, and
batch t is places t B to (t + 1) B - 1 of that sequence. So branches that start from one checkpoint
see the same batches, whatever else draws random numbers, and a resumed run goes on with them.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from thalweg.lab.training.random_streams import stream_seed


def minibatch(seed: int, step: int, batch_size: int, num_samples: int) -> Tensor:
    """Indices of the samples of batch `step`, int64 (batch_size,), on the CPU."""
    if batch_size == num_samples:
        return torch.arange(num_samples)
    begin = step * batch_size
    parts: list[Tensor] = []
    missing = batch_size
    while missing:
        epoch, place = divmod(begin, num_samples)
        part = _order(seed, epoch, num_samples)[place : place + missing]
        parts.append(part)
        begin += len(part)
        missing -= len(part)
    return torch.cat(parts)


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, num_samples: int) -> Tensor:
    generator = torch.Generator().manual_seed(stream_seed("data order", seed, epoch))
    return torch.randperm(num_samples, generator=generator)
