"""Does a process still do something? Signs of life that cannot lie, and how long there was none.

A process tells its parent every second how much processor time it has used. One that is stopped
tells nothing; one that waits for a dead disk, or for a lock that nobody releases, tells the same
again and again. A long solve or step is no hang, since it computes. One that spins for ever is not
noticed.

Silence is counted by the parent's monotonic clock, and only while the parent itself is awake: a
suspended laptop, or a study that is stopped by Ctrl-Z, does not end its runs.

Example:
    >>> times = iter([0.0, 1.0, 2.0, 3600.0])
    >>> signs = SignsOfLife(clock=lambda: next(times))
    >>> signs.note(17), signs.silence()
    (None, 1.0)
    >>> signs.note(17), signs.silence()
    (None, 2.0)
    >>> signs.note(18), signs.silence()  # the parent was suspended for an hour
    (None, 2.0)
"""

from __future__ import annotations

import time
from collections.abc import Callable

BEAT_SECONDS = 1.0
"""Between two messages of a process."""
AWAKE_SECONDS = 2.0
"""More than this between two looks of the parent does not count: it was not awake."""
CPU_SECONDS = 0.1
"""So much processor time is a sign of life."""
HUNG_AFTER = 30.0
"""Minutes without a sign of life after which a process is ended."""


class SignsOfLife:
    """Counts how long a process has shown none.

    Args:
        clock: seconds, of a clock that nobody sets.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._looked = clock()
        self._last: object = None
        self._silence = 0.0

    def note(self, told: object) -> None:
        """Take what the process tells; it is a sign of life where it is something new."""
        if told != self._last:
            self._last, self._silence = told, 0.0

    def silence(self) -> float:
        """Seconds since the last sign, those while this process slept left out; ask often."""
        now = self._clock()
        self._silence += min(now - self._looked, AWAKE_SECONDS)
        self._looked = now
        return self._silence


def processor_time() -> int:
    """Processor time of this process without the calling thread's, in units of `CPU_SECONDS`."""
    return int((time.process_time() - time.thread_time()) / CPU_SECONDS)
