"""What do several processes cost and gain? Times of one and two, bytes of up to four.

    python benchmarks/processes.py
    python benchmarks/processes.py --samples 20000 --width 800

Each process has one thread and its part of the samples of one loss; gloo joins them on this
machine. A row for each number of processes: processor seconds that one of them takes for a gradient
and for a block of k products (median, and beside one process alone in the same run): what the
clock would show with a core for each, but for the exchange. Then what a process brings to exchanges
in one block: how many there are, and numbers in units of P; and what following a subspace takes a
step. Last the seconds of one exchange of k P numbers by the clock, which other work on the machine
lengthens.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from thalweg.environment import usable_cores
from thalweg.loss.objective import Objective
from thalweg.loss.reduce import AcrossProcesses
from thalweg.operators.hessian import Hessian
from thalweg.spectrum.gap import GapClosed
from thalweg.tracking.tracker import SubspaceTracker

COUNTS, REPEATS, K, STEPS = (1, 2, 4), 5, 9, 10


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--width", type=int, default=300)
    options = parser.parse_args()
    cores = usable_cores()
    print(
        f"{options.samples} samples, width {options.width}, k = {K}, {cores} cores, one thread each"
    )
    print("processes  P  gradient  of one  block  of one  sums  numbers/P  a sum of k P")
    first: tuple[float, float] | None = None
    for count in COUNTS:
        with tempfile.TemporaryDirectory() as folder:
            given = (count, folder, options.samples, options.width)
            torch.multiprocessing.spawn(measure, given, nprocs=count)
            found = torch.load(Path(folder) / "found.pt")
        times = found["gradient"], found["block"]
        first = first or times
        shown = [f"{now:.3f} s  {now / one:.2f}" for now, one in zip(times, first, strict=True)]
        sums = f"{found['sums']:.0f}  {found['numbers']:.2f}  {1e3 * found['sum']:.1f} ms"
        print(f"{count}  {found['P']:,}  {shown[0]}  {shown[1]}  {sums}", flush=True)
        print(
            f"   {STEPS} steps followed: {found['step sums']:.1f} sums and"
            f" {found['step numbers']:.1f} P numbers a step"
        )


def measure(rank: int, count: int, folder: str, samples: int, width: int) -> None:
    """One process of some."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", GapClosed)
    store = dist.FileStore(f"{folder}/store", count)
    patience = timedelta(minutes=10)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=patience)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(784, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10)
    )
    targets = torch.randint(0, 10, (samples,))
    inputs = torch.randn(10, 784)[targets] + torch.randn(samples, 784)
    rows = (inputs.tensor_split(count)[rank], targets.tensor_split(count)[rank])
    group = dist.group.WORLD
    loss = Objective(model, nn.CrossEntropyLoss(), rows, group=group, vectorize_up_to=0)
    reduction = loss.reduction
    assert isinstance(reduction, AcrossProcesses)
    block = torch.randn(loss.num_parameters, K)
    theta = loss.theta()
    _ = Hessian(loss) @ block  # warms up, and looks once at what is looked at once

    found = {"P": loss.num_parameters, "gradient": median(loss.gradient)}
    sums, numbers = reduction.num_sums, reduction.num_bytes
    found["block"] = median(lambda: Hessian(loss, theta) @ block)
    found["sums"] = (reduction.num_sums - sums) / REPEATS
    size = theta.element_size() * loss.num_parameters * REPEATS
    found["numbers"] = (reduction.num_bytes - numbers) / size
    found["sum"] = median(lambda: reduction.sum(block.T.contiguous()), time.perf_counter)

    tracker = SubspaceTracker(loss, K, error=0.05, seed=0)
    tracker.update(theta)
    sums, numbers = reduction.num_sums, reduction.num_bytes
    for step in range(1, STEPS + 1):
        tracker.update(theta * (1 + 1e-4 * step))
    found["step sums"] = (reduction.num_sums - sums) / STEPS
    found["step numbers"] = (reduction.num_bytes - numbers) / (size / REPEATS * STEPS)
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.barrier()
    dist.destroy_process_group()


def median(work: Callable[[], object], clock: Callable[[], float] = time.process_time) -> float:
    """Processor seconds of this process: it waits for the others in each sum."""
    seconds = []
    for _ in range(REPEATS):
        begin = clock()
        work()
        seconds.append(clock() - begin)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
