"""Which random numbers does each part of a run draw? Streams of their own, from the run's seed.

Order of the data, dropout and the tracker's samples each have a stream, so that what one part draws
never changes another part's numbers.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def stream_seed(purpose: str, *numbers: int) -> int:
    """A seed below 2^63 for one purpose, from whole numbers such as the run's seed."""
    words = " ".join((purpose, *map(str, numbers)))
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "big") >> 1


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The state of the generators that a model on this device draws from (dropout): on the CPU."""
    import torch

    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def restore_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Restore what `random_state` gave; the state of a device that is not used is left out."""
    import torch

    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
    elif device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"].cpu())
