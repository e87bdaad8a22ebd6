"""What is a fault, and what became of one attempt at it?

A fault is one entry of the table in docs/reliability.md: a function that is given an `Attempt`,
does the harm, and raises where a study did not survive it. What an attempt does depends on its
number and the seed of all alone, so that a failed one is repeated by

    python -m benchmarks.reliability --seed SEED --only NAME --case NUMBER
"""

from __future__ import annotations

import logging
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

MEMORY = Path("/dev/shm")
PATIENCE = 300.0
"""Seconds in which a command of a small study must have ended."""
LONGEST = 1200
"""Seconds of the longest attempt."""


class Exhausted(Exception):
    """All cases of the fault have been tried."""


class Unable(Exception):
    """The fault cannot be had on this machine: no mount, no links."""


@dataclass(frozen=True)
class Attempt:
    """One go at a fault.

    Attributes:
        case: its number; random choices depend on it alone.
        chance: random numbers of this case.
        folder: an empty folder of its own, in memory where there is such a place.
    """

    case: int
    chance: Random
    folder: Path


@dataclass(frozen=True)
class Fault:
    """An entry of the table.

    Attributes:
        key: a short name for the command line.
        happens: what happens, for the reader.
        survived: what counts as survived.
        lost: what is lost at most.
        attempt: does it; returns what was lost as a number, where that is measured.
        unit: of that number.
    """

    key: str
    happens: str
    survived: str
    lost: str
    attempt: Callable[[Attempt], float | None]
    unit: str = ""


@dataclass
class Tried:
    """What became of one attempt.

    Attributes:
        key: of the fault.
        case: its number.
        seconds: that it took.
        lost: as a number, where that is measured.
        failure: why it is none that a study survived; empty: it did.
        unable: why it could not be tried.
        exhausted: whether there is no such case.
    """

    key: str
    case: int
    seconds: float = 0.0
    lost: float | None = None
    failure: str = ""
    unable: str = ""
    exhausted: bool = False


@dataclass
class Family:
    """Faults of one kind, in the order of the table."""

    name: str
    faults: list[Fault] = field(default_factory=list)

    def fault(
        self, happens: str, *, survived: str, lost: str, unit: str = ""
    ) -> Callable[[Callable[[Attempt], float | None]], Callable[[Attempt], float | None]]:
        """Register a function as an entry; see `Fault`."""

        def register(attempt: Callable[[Attempt], float | None]):
            key = getattr(attempt, "__name__", happens)
            self.faults.append(Fault(key, happens, survived, lost, attempt, unit))
            return attempt

        return register


@contextmanager
def _alarm(seconds: int) -> Iterator[None]:
    """Raise where an attempt hangs, as on a pipe that nobody writes to."""

    def ring(*_: object) -> None:
        raise TimeoutError(f"no end after {seconds} s")

    earlier = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, earlier)


def try_once(fault: Fault, case: int, seed: int = 0) -> Tried:
    """One attempt, in a folder of its own that is removed afterwards."""
    begun = time.monotonic()
    logging.disable(logging.WARNING)  # of each damaged checkpoint that is passed over
    tried = Tried(fault.key, case)
    chance = Random(f"{seed} {fault.key} {case}")
    place = MEMORY if MEMORY.is_dir() else None
    folder = Path(tempfile.mkdtemp(prefix="thalweg-fault-", dir=place))
    try:
        with _alarm(LONGEST):
            tried.lost = fault.attempt(Attempt(case, chance, folder))
    except Exhausted:
        tried.exhausted = True
    except Unable as reason:
        tried.unable = str(reason)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        words = f"{type(error).__name__}: {error}"
        tried.failure = f"{words[:1500]} ({Path(where.filename).name}:{where.lineno})"
    finally:
        logging.disable(logging.NOTSET)
        shutil.rmtree(folder, ignore_errors=True)
    tried.seconds = time.monotonic() - begun
    return tried
