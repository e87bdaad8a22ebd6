"""What a long solve says of itself: products, residual, and about how long it will still take.

A solve that takes longer than `PATIENCE` seconds says so, again and again: on a terminal and in a
notebook on standard error, elsewhere to the logger "thalweg". `reported_to` takes it elsewhere, or
nowhere. Nothing is decided by these seconds.

Example:
    >>> import torch
    >>> from thalweg.operators.symmetric import DenseOperator
    >>> from thalweg.spectrum.eigensolver import eigenpairs
    >>> seen = []
    >>> with reported_to(seen.append, patience=0.0):
    ...     _ = eigenpairs(DenseOperator(torch.diag(torch.arange(50.0))), 2)
    >>> seen[-1].num_matvecs > 2, seen[-1].residual <= seen[-1].tolerance
    (True, True)
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

PATIENCE = 5.0
"""Seconds before a solve says how it goes, and between two such lines."""


@dataclass(frozen=True)
class SolveProgress:
    """How far a solve has come.

    Attributes:
        what: what is solved for.
        num_matvecs: products made.
        max_matvecs: at which it gives up.
        residual: the largest, relative; infinite while there are too few vectors.
        tolerance: at which it ends.
        seconds: since it began.
        seconds_left: about; NaN where not known yet.
    """

    what: str
    num_matvecs: float
    max_matvecs: int
    residual: float
    tolerance: float
    seconds: float
    seconds_left: float

    def __str__(self) -> str:
        residual = f"{self.residual:.1e}" if math.isfinite(self.residual) else "not known yet"
        left = f", about {self.seconds_left:.0f} s left" if self.seconds_left > 0 else ""
        return (
            f"{self.what}: {self.num_matvecs:g} products of at most {self.max_matvecs}, residual"
            f" {residual} (to {self.tolerance:.0e}), {self.seconds:.0f} s{left}"
        )


Report = Callable[[SolveProgress], object]


def _say(progress: SolveProgress) -> None:
    """On standard error where somebody looks on, to the log elsewhere."""
    shell = sys.modules.get("IPython")
    in_notebook = shell is not None and shell.get_ipython() is not None
    error = sys.stderr
    if error is not None and (in_notebook or error.isatty()):
        print(f"thalweg: {progress}", file=error, flush=True)
    else:
        logging.getLogger("thalweg").info("%s", progress)


_REPORT: ContextVar[tuple[Report | None, float]] = ContextVar("report", default=(_say, PATIENCE))


@contextmanager
def reported_to(report: Report | None, *, patience: float = PATIENCE) -> Iterator[None]:
    """Hand what solves in the block say of themselves to a function; None: to nobody.

    Args:
        report: called with each `SolveProgress`.
        patience: seconds before the first one, and between two. Example: see the module.
    """
    token = _REPORT.set((report, patience))
    try:
        yield
    finally:
        _REPORT.reset(token)


class SolveClock:
    """Says now and then how a solve goes.

    Args:
        what: what is solved for.
        max_matvecs: products at which it gives up.
        tolerance: of the residual.
    """

    def __init__(self, what: str, max_matvecs: int, tolerance: float) -> None:
        self.what, self.max_matvecs, self.tolerance = what, max_matvecs, tolerance
        self._report, self._patience = _REPORT.get()
        self._begun = self._said = time.monotonic()
        # Where the residual was first known: products, and its logarithm.
        self._first: tuple[float, float] | None = None

    def note(self, num_matvecs: float, residual: float) -> None:
        """Note how far it has come; says so where that is due."""
        if self._first is None and 0 < residual < math.inf:
            self._first = num_matvecs, math.log(residual)
        now = time.monotonic()
        if self._report is None or now - self._said < self._patience:
            return
        self._said = now
        seconds = now - self._begun
        left = self._products_left(num_matvecs, residual) * seconds / max(num_matvecs, 1.0)
        known = self.what, num_matvecs, self.max_matvecs, residual, self.tolerance
        self._report(SolveProgress(*known, seconds, left))

    def _products_left(self, num_matvecs: float, residual: float) -> float:
        """By how fast the residual has fallen so far; NaN where it has not."""
        if self._first is None or not 0 < residual < math.inf:
            return math.nan
        fallen = self._first[1] - math.log(residual)
        if fallen <= 0:
            return math.nan
        wanted = max(0.0, math.log(residual / self.tolerance))
        left = wanted / fallen * (num_matvecs - self._first[0])
        return min(left, self.max_matvecs - num_matvecs)
