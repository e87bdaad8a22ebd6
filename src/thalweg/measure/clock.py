"""How long does a call take? On a GPU too, which works on after the call has returned."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def now(device: torch.device | str) -> float:
    """Seconds of a clock, read when all that was asked of a device is done."""
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    elif torch.device(device).type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


class Clock:
    """Times calls, and keeps a budget.

    Args:
        device: where the calls compute; they are waited for there.
        budget: seconds for everything.

    Example:
        >>> clock = Clock("cpu", budget=60.0)
        >>> clock.seconds(lambda: None, times=3) < 1.0
        True
        >>> clock.affords(1.0), clock.affords(61.0)
        (True, False)
    """

    def __init__(self, device: torch.device | str, budget: float) -> None:
        self.device = device
        self._deadline = time.perf_counter() + budget

    def affords(self, seconds: float) -> bool:
        """Whether so many seconds are left of the budget."""
        return time.perf_counter() + seconds <= self._deadline

    def seconds(self, function: Callable[[], object], times: int = 1) -> float:
        """Mean seconds of a call."""
        begin = now(self.device)
        for _ in range(times):
            function()
        return (now(self.device) - begin) / times
