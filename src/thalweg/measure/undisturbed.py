"""Measure in the middle of a training without leaving a trace in it.

Example:
    >>> import random, torch
    >>> state = random.getstate()
    >>> with undisturbed(torch.device("cpu")):
    ...     _ = random.random(), torch.rand(1)
    >>> random.getstate() == state
    True
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Put the random generators of Python, NumPy and torch back, whatever the block drew.

    What is in it runs in the precision of its tensors, also within the user's `torch.autocast`.

    Args:
        device: whose generator is put back besides that of the CPU.
    """
    python_state = random.getstate()
    # The engine needs torch alone: where NumPy was never imported nobody has drawn from it.
    numpy = sys.modules.get("numpy")
    numpy_state = None if numpy is None else numpy.random.get_state()
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), torch.autocast(device.type, enabled=False):
            yield
    finally:
        random.setstate(python_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)
