"""Several processes of a test, joined by gloo through a file: no port, patient at the start."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from thalweg.lab.execution.processes import context

PATIENCE = timedelta(seconds=100)
"""For a machine so busy that processes start long after one another."""


def in_processes(
    count: int,
    work: Callable[..., Any],
    folder: Path,
    *arguments: Any,
    backend: str = "gloo",
) -> list[dict[str, Any]]:
    """What `work(rank, *arguments)` gives in each of some processes: a dict of tensors and texts.

    Args:
        work: a function of a module, which the processes import.
        folder: empty, for the file through which they find one another, and their results.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.multiprocessing.start_processes(
        _work,
        (count, work, str(folder), backend, *arguments),
        nprocs=count,
        # That of the lab, whose processes are forked from one that has imported torch.
        start_method=context().get_start_method(),
    )
    return [torch.load(folder / f"{rank}.pt") for rank in range(count)]


def joined(rank: int, count: int, folder: str, backend: str = "gloo") -> None:
    """Join the group of this test's processes."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.FileStore(f"{folder}/store", count)
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=PATIENCE)


def _work(
    rank: int,
    count: int,
    work: Callable[..., Any],
    folder: str,
    backend: str,
    *arguments: Any,
) -> None:
    torch.set_num_threads(1)
    joined(rank, count, folder, backend)
    try:
        found = work(rank, *arguments)
    except BaseException:
        traceback.print_exc()
        raise
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
