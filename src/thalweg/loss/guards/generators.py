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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from thalweg.errors import invalid


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


@contextmanager
def begun_at(device: torch.device, seed: int) -> Iterator[States]:
    """All generators begin at a seed inside of the block, and are put back after it.

    Yields:
        Their states at the beginning, which tell what was drawn.
    """
    with generators_kept(device):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        random.seed(seed)
        numpy = _numpy()
        if numpy is not None:
            numpy.random.seed(seed % 2**32)
        yield States(device)


def refuse_unfit_seed(seed: int | None) -> int | None:
    """The seed.

    Raises:
        InvalidInput: it is no integer >= 0 that torch can take, nor None.
    """
    if seed is None:
        return None
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise invalid("seed", seed, "an integer >= 0, or None")
    if seed >= 2**63:
        raise invalid("seed", seed, "an integer below 2**63")
    return seed


def refuse_other_seed(seed: int | None, state: Mapping[str, Any]) -> None:
    """Raise where a saved state is that of another draw.

    Raises:
        InvalidInput: it says another seed; one that says none is taken.
    """
    if state.get("seed", seed) != seed:
        raise invalid("seed", seed, f"{state['seed']}, with which the state was saved")


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

    def moved(self) -> list[str]:
        """Whose generators have given numbers since: "torch", "Python's random", "NumPy"."""
        now, found = States(self.device), []
        cuda = self.cuda is not None and now.cuda is not None
        if not torch.equal(self.torch, now.torch) or (
            cuda and not torch.equal(self.cuda, now.cuda)  # type: ignore[arg-type]
        ):
            found.append("torch")
        if self.python != now.python:
            found.append("Python's random")
        if (
            self.numpy is not None
            and now.numpy is not None
            and _plain(self.numpy) != _plain(now.numpy)
        ):
            found.append("NumPy")
        return found


def _plain(state: Any) -> tuple[Any, ...]:
    return tuple(part.tobytes() if hasattr(part, "tobytes") else part for part in state)


def _numpy() -> Any:
    """NumPy, where anybody has imported it: the engine needs torch alone."""
    return sys.modules.get("numpy")
