"""Which signals ask to stop, and who hears them?

Ctrl-C, SIGTERM and SIGUSR1 ask a command or a run to stop. The command line hears them from its
first line to its last; while runs go on the executor does, which passes them on.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)
)
"""The signals that ask to stop, those of them that this system has."""


@contextmanager
def on_stop_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` when a signal asks to; Python hears signals in its main thread only.

    What was called before is called again afterwards.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = {number: signal.signal(number, lambda *_: stop()) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            # None: it was not set by Python, which cannot set it again.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextmanager
def stop_signals_held() -> Iterator[None]:
    """Let signals that ask to stop wait for the end of the block.

    A process that is started in it holds them too, until `release_stop_signals`.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def release_stop_signals() -> None:
    """Hear from here on what a process was started to hold."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
