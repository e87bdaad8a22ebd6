"""What is there to compute with, and how many runs go side by side?"""

from __future__ import annotations

import os

from thalweg.environment import usable_cores
from thalweg.errors import InvalidInput


def resolve_device(device: str) -> str:
    """What "auto" means here; a device that is asked for must exist.

    Raises:
        InvalidInput: there is no such device.
    """
    import torch

    has_cuda = torch.cuda.is_available()
    if device == "auto":
        return "cuda" if has_cuda else "cpu"
    known = ["cpu"]
    if has_cuda:
        known += ["cuda", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        known.append("mps")
    if device not in known:
        allowed = ", ".join(repr(name) for name in ("auto", *known))
        raise InvalidInput(f"device: got {device!r}, allowed on this machine: {allowed}")
    return device


def compute_repeatably(device: str) -> None:
    """From here on this process computes the same numbers from the same seed, also on a GPU.

    And float32 is float32 in a training's convolutions too, not TF32. To be called before anything
    is computed: cuBLAS looks at its setting once. Where torch has no deterministic way it warns,
    into the log of a run. On a CPU nothing is changed: there it is so.

    Args:
        device: where this process computes, such as "cuda:1".
    """
    if not device.startswith("cuda"):
        return
    import torch
    from torch.utils import deterministic

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # All that Thalweg allocates is written before it is read.
    deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
    torch.backends.cudnn.rnn.fp32_precision = "ieee"  # type: ignore[attr-defined]


def default_workers(threads: int, device: str) -> int:
    """Processes side by side: as many as the cores take on a CPU, one on a GPU.

    Small problems are bound by overheads: one thread a process and as many processes as cores was
    several times faster than two processes with two threads each.
    """
    return max(1, usable_cores() // threads) if device == "cpu" else 1
