"""The generators of random numbers that a program shares: torch's, Python's and NumPy's.

Example:
    >>> import random, torch
    >>> state = random.getstate()
    >>> with generators_kept(torch.device("cpu")):
    ...     _ = random.random(), torch.rand(1)
    >>> random.getstate() == state
    True
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def generators_kept(device: torch.device, own: Sequence[torch.Generator] = ()) -> Iterator[None]:
    """Put all generators back, whatever the block drew.

    Args:
        device: whose generator is put back besides that of the CPU.
        own: generators of the user's that are put back too.
    """
    states = States(device)
    others = [generator.get_state() for generator in own]
    try:
        yield
    finally:
        states.restore()
        for generator, state in zip(own, others, strict=True):
            generator.set_state(state)


class States:
    """The states of the generators at one moment."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.torch = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        self.python = random.getstate()
        numpy = _numpy()
        self.numpy = None if numpy is None else numpy.random.get_state()

    def restore(self) -> None:
        torch.set_rng_state(self.torch)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)
        random.setstate(self.python)
        numpy = _numpy()
        if numpy is not None and self.numpy is not None:
            numpy.random.set_state(self.numpy)

    def moved(self) -> str:
        """Whose generator has given numbers since: "torch", "Python's random", "NumPy"; or ""."""
        now = States(self.device)
        if not torch.equal(self.torch, now.torch):
            return "torch"
        if self.cuda is not None and now.cuda is not None and not torch.equal(self.cuda, now.cuda):
            return "torch"
        if self.python != now.python:
            return "Python's random"
        both = self.numpy is not None and now.numpy is not None
        return "NumPy" if both and _plain(self.numpy) != _plain(now.numpy) else ""


def _plain(state: Any) -> tuple[Any, ...]:
    return tuple(part.tobytes() if hasattr(part, "tobytes") else part for part in state)


def _numpy() -> Any:
    """NumPy, where anybody has imported it: the engine needs torch alone."""
    return sys.modules.get("numpy")
