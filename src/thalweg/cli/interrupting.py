"""How does a signal that asks to stop end a command, at any line of it?

It raises a `KeyboardInterrupt` wherever the command is, which no `except Exception` holds up, and
which leaves no half-written file: each is built under another name. While runs go on their executor
hears the signals instead, and lets them save a checkpoint.
"""

from __future__ import annotations

import signal
import sys
from contextlib import ExitStack
from typing import Any

from thalweg.interruption import STOP_SIGNALS, on_stop_signals

AGAIN_SECONDS = 0.05


class Stopped(KeyboardInterrupt):
    """Somebody asked to stop.

    Not the class itself: where that leaves a piece of code that is run from text, as named tuples
    are made, Python ends the process by SIGINT, whatever exit status it is given later.
    """


class Interruptions:
    """From here on, signals that ask to stop raise; afterwards they do what they did before.

    Args:
        last: the process ends afterwards: signals stay ignored then.

    Attributes:
        asked: whether one has been heard.
    """

    def __init__(self, *, last: bool) -> None:
        self.asked = False
        self._last = last
        self._stack = ExitStack()

    def __enter__(self) -> Interruptions:
        self._stack.enter_context(on_stop_signals(self._stop))
        self._show_lost = sys.unraisablehook
        sys.unraisablehook = self._lost
        return self

    def __exit__(self, *_: object) -> None:
        sys.unraisablehook = self._show_lost
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
        if self._last:
            self.ignore()
        else:
            self._stack.close()

    def ignore(self) -> None:
        """Hear no more of them: the command is ending."""
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _stop(self) -> None:
        self.asked = True
        raise Stopped

    def _lost(self, unraisable: Any) -> None:
        """What was raised in a destructor, or in a callback of an import, goes nowhere: again."""
        if not (self.asked and isinstance(unraisable.exc_value, Stopped)):
            self._show_lost(unraisable)
        elif hasattr(signal, "setitimer"):
            signal.signal(signal.SIGALRM, lambda *_: self._stop())
            signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS)
