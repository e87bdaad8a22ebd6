"""What does a study survive? Every fault of `benchmarks/faults`, as often as time allows.

    python -m benchmarks.reliability --minutes 60 --page docs/reliability.md    # make faults
    python -m benchmarks.reliability --seed 3 --only flipped --case 17          # one attempt again

Run from the root of the repository: faults use what the tests have. Families share the time evenly,
and so do the faults of a family. Exit status 1 where one was not survived; each such attempt is
printed with the command that repeats it.
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch
from benchmarks.faults import disks, files, healthy, kills, readers, stops, watching
from benchmarks.faults.fault import Family, Fault, Tried, try_once
from benchmarks.faults.page import Counts, page
from benchmarks.faults.studies import CHECKPOINT_EVERY, server

import thalweg

FAMILIES: Sequence[Family] = [
    module.FAMILY for module in (kills, stops, disks, files, readers, watching, healthy)
]
TOLD_EVERY = 50
FAULTS = {fault.key: fault for family in FAMILIES for fault in family.faults}


def attempt(key: str, case: int, seed: int) -> Tried:
    """One attempt, in a process of the pool."""
    torch.set_num_threads(1)
    return try_once(FAULTS[key], case, seed)


class Turns:
    """Whose turn is it? That of the family, and in it of the fault, with the least time so far.

    Args:
        families: what there is to be tried.
    """

    def __init__(self, families: Sequence[Family]) -> None:
        self.counts = {fault.key: Counts() for family in families for fault in family.faults}
        self._families = families
        self._begun = dict.fromkeys(self.counts, 0)
        self._at_work = dict.fromkeys(self.counts, 0)

    def next(self) -> tuple[Fault, int] | None:
        """The next fault and its case; None where all cases of all have been tried."""
        open_ones = [
            (family, fault)
            for family in self._families
            for fault in family.faults
            if not self.counts[fault.key].exhausted
        ]
        if not open_ones:
            return None
        _, fault = min(open_ones, key=lambda pair: (self._of(pair[0].faults), self._of([pair[1]])))
        case = self._begun[fault.key]
        self._begun[fault.key] += 1
        self._at_work[fault.key] += 1
        return fault, case

    def done(self, tried: Tried) -> None:
        """Note what came of one."""
        self._at_work[tried.key] -= 1
        self.counts[tried.key].add(tried)

    def _of(self, faults: Sequence[Fault]) -> float:
        """Seconds that faults have had; one at work counts as a mean one."""
        total = 0.0
        for fault in faults:
            counts = self.counts[fault.key]
            mean = counts.seconds / max(1, counts.tried) or 1.0
            total += counts.seconds + mean * self._at_work[fault.key]
        return total


def attempts(turns: Turns, seconds: float, seed: int, workers: int) -> Iterator[Tried]:
    """Try until the time is over, or all has been tried; what is at work then is waited for."""
    deadline = time.monotonic() + seconds
    pool = ProcessPoolExecutor(workers, mp_context=server())
    at_work: dict[Future[Tried], tuple[str, int]] = {}
    while True:
        while len(at_work) < workers and time.monotonic() < deadline and (turn := turns.next()):
            fault, case = turn
            at_work[pool.submit(attempt, fault.key, case, seed)] = (fault.key, case)
        if not at_work:
            break
        for future in wait(at_work, return_when=FIRST_COMPLETED).done:
            key, case = at_work.pop(future)
            try:
                tried = future.result()
            except BrokenProcessPool:
                tried = Tried(key, case, failure="its process died")
                pool = ProcessPoolExecutor(workers, mp_context=server())
            turns.done(tried)
            yield tried
    pool.shutdown()


def tell(tried: Tried, seed: int) -> None:
    """Print an attempt that was not survived, and how to repeat it."""
    if tried.failure:
        command = f"python -m benchmarks.reliability --seed {seed} --only {tried.key}"
        print(f"{tried.key}: {tried.failure}\n    {command} --case {tried.case}", flush=True)


def made_with(counts: dict[str, Counts], seconds: float, seed: int) -> str:
    """A line on what the page was made with."""
    total = sum(each.tried for each in counts.values())
    return (
        f"Thalweg {thalweg.__version__}, torch {torch.__version__}, {os.cpu_count()} cores,"
        f" {seconds:,.0f} s, seed {seed}: {total:,} attempts."
    )


def main() -> int:
    """Run what the command line asks for; the exit status."""
    parser = argparse.ArgumentParser(description="Harm studies, and see what they survive.")
    parser.add_argument("--minutes", type=float, default=60.0, help="for all faults together")
    parser.add_argument("--seed", type=int, help="of all random choices; default: a new one")
    parser.add_argument("--only", choices=FAULTS, help="one fault alone")
    parser.add_argument("--case", type=int, help="one attempt at it alone")
    parser.add_argument("--workers", type=int, default=2, help="attempts side by side")
    parser.add_argument("--page", type=Path, help="where to write the table")
    options = parser.parse_args()
    seed = secrets.randbelow(10**6) if options.seed is None else options.seed
    if options.only and options.case is not None:
        tried = attempt(options.only, options.case, seed)
        print(tried)
        return int(bool(tried.failure))
    families = FAMILIES
    if options.only:
        families = [Family(options.only, [FAULTS[options.only]])]
    print(f"seed {seed}", flush=True)
    begun, turns = time.monotonic(), Turns(families)
    for number, tried in enumerate(attempts(turns, 60 * options.minutes, seed, options.workers), 1):
        tell(tried, seed)
        if number % TOLD_EVERY == 0:
            print(f"{number} attempts, {time.monotonic() - begun:.0f} s", flush=True)
    made = made_with(turns.counts, time.monotonic() - begun, seed)
    text = page(families, turns.counts, made, CHECKPOINT_EVERY)
    if options.page:
        options.page.write_text(text, encoding="utf-8")
    print(text if not options.page else made)
    return int(any(each.failures for each in turns.counts.values()))


if __name__ == "__main__":
    sys.exit(main())
