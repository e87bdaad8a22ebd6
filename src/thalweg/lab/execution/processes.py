"""How is a function called in a process of its own, and how did that end?

A crash, or running out of memory, ends that process alone. Processes are forked from a clean server
that has imported PyTorch, where there is one: starting one then takes milliseconds instead of the
four seconds of the imports. A process does not outlive the one that started it, however that ends,
and the other way round: one that shows no sign of life (`signs_of_life.py`) can be ended.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from multiprocessing import process
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

from thalweg import errors
from thalweg.errors import Interrupted, ThalwegError
from thalweg.interruption import STOP_SIGNALS, release_stop_signals, stop_signals_held
from thalweg.lab.execution.signs_of_life import (
    BEAT_SECONDS,
    HUNG_AFTER,
    SignsOfLife,
    processor_time,
)
from thalweg.lab.store.durable import full_disk_told
from thalweg.lab.store.links import open_plain

PRELOADED = [
    "thalweg.lab.training",
    "torch._dynamo",
    "pyarrow.parquet",
    "pandas",
    "safetensors.torch",
]
"""What the server imports. The first optimizer that is built imports `torch._dynamo`: 2 seconds;
the first table of PyArrow imports pandas where it is installed: 0.2 seconds."""
ORPHANED = 1
"""Exit status of a process whose parent is gone: nobody reads it."""
LOST = 255
"""What is said of a process that ended after the server that had started it."""
POLL_SECONDS = 0.1
UNKILLABLE_SECONDS = 10.0
"""Not even SIGKILL ends a process that waits for a dead disk: it is waited for so long."""
OUTSIDE = ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGQUIT", "SIGXCPU")
"""Signals that come from outside of a process, unlike those of a crash."""


@dataclass(frozen=True)
class Ending:
    """How a process ended.

    Attributes:
        exit_code: 0, the `exit_code` of the error, or 1 for an error that was nobody's intention.
        message: of the error, one line or more.
        value: what the function returned.
        kind: name of the error's class, or of what it derives from, in `thalweg.errors`.
        killed: whether it was ended from outside; it may do well if it is tried again.
    """

    exit_code: int
    message: str = ""
    value: Any = None
    kind: str = ""
    killed: bool = False

    @classmethod
    def by_error(cls, error: BaseException) -> Ending:
        """That of a function which raised."""
        if isinstance(error, ThalwegError):
            known = (one for one in type(error).__mro__ if one.__module__ == errors.__name__)
            return cls(error.exit_code, str(error), kind=next(known).__name__)
        return cls(1, " ".join(f"{type(error).__name__}: {error}".split()))

    @classmethod
    def from_outside(cls, message: str) -> Ending:
        """That of a process which was ended by somebody else; what it was at can be continued."""
        return cls(Interrupted.exit_code, message, kind=Interrupted.__name__, killed=True)


def context() -> BaseContext:
    """How processes start on this system."""
    if sys.platform == "win32":
        return multiprocessing.get_context("spawn")
    chosen = multiprocessing.get_context("forkserver")
    chosen.set_forkserver_preload(PRELOADED)
    return chosen


class Child:
    """A function at work in a process of its own.

    Args:
        function: of a module's top level; it gets `arguments`, and returns plain values.
        output: file that takes what the process prints; None for standard error. Standard output
            is for results alone.
        grace: seconds that the process has left to end by itself once its parent is gone.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        output: Path | None = None,
        *,
        grace: float = 0.0,
    ) -> None:
        chosen = context()
        _start_server()
        self._receiving, sending = chosen.Pipe(duplex=False)
        self._process = chosen.Process(  # type: ignore[attr-defined]
            target=_call, args=(sending, function, arguments, output, grace)
        )
        try:
            self._process.start()
        except BaseException:
            _end_server()  # or it would start the process still, which nobody knows of
            raise
        sending.close()
        self._signs = SignsOfLife()
        self._ending: Ending | None = None
        self._heard_all = False
        self._killed_because: str | None = None
        self._killed_at = inf

    @property
    def pid(self) -> int | None:
        """The number of the process."""
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether it has not ended yet; one that not even SIGKILL ends is given up."""
        given_up = time.monotonic() - self._killed_at > UNKILLABLE_SECONDS
        return self._process.exitcode is None and not given_up

    @property
    def sentinel(self) -> int:
        """What `multiprocessing.connection.wait` waits for: the end of the process."""
        return self._process.sentinel

    def ask_to_stop(self) -> None:
        """Send SIGTERM: a run saves a checkpoint and ends."""
        self._process.terminate()

    def kill(self, because: str = "") -> None:
        """End it at once.

        Args:
            because: what its ending says; default: that it was ended by SIGKILL.
        """
        if self._killed_because is None:
            self._killed_because, self._killed_at = because, time.monotonic()
        self._process.kill()

    @property
    def has_told(self) -> bool:
        """Whether it has told how it ended."""
        return self._ending is not None

    def kill_if_hung(self, minutes: float) -> None:
        """End it if it has shown no sign of life for so many minutes, 0 for never; ask often."""
        self._hear()
        if 0 < 60 * minutes <= self._signs.silence() and self._killed_because is None:
            self.kill(
                f"no sign of life for {minutes:g} min (no step, no processor time: stopped, or a"
                f" dead disk?): its process {self.pid} was ended"
            )

    def ending(self) -> Ending:
        """Wait for the end, and say what it was."""
        patience = None if self._killed_because is None else UNKILLABLE_SECONDS
        # Heard first: a process with much to return waits until it is read.
        while self._ending is None and not self._heard_all and self._receiving.poll(patience):
            self._hear()
        self._process.join(patience)
        self._receiving.close()
        if self._process.exitcode is None:
            # The end of this process would wait for it, too.
            vars(process).get("_children", set()).discard(self._process)
        if self._ending is not None:
            return self._ending
        if self._killed_because or self._process.exitcode is None:
            return Ending.from_outside(self._killed_because or "its process could not be ended")
        return _without_word(self._process.exitcode or 0)

    def _hear(self) -> None:
        """Take all that the process has told so far."""
        try:
            while self._ending is None and self._receiving.poll():
                told = self._receiving.recv()
                if isinstance(told, Ending):
                    self._ending = told
                else:
                    self._signs.note(told)
        except (EOFError, OSError):
            self._heard_all = True


def call(
    function: Callable[..., Any], arguments: tuple[Any, ...], *, hung_after: float = HUNG_AFTER
) -> Any:
    """What the function returns, called in a process of its own.

    Args:
        hung_after: minutes without a sign of life after which it is ended; 0 for never.

    Raises:
        ThalwegError: of the class that the function raised; its base class for other errors.
        Interrupted: the process was ended from outside.
    """
    child = Child(function, arguments)
    try:
        while child.is_running:
            child.kill_if_hung(hung_after)
            if child.has_told or wait([child.sentinel], POLL_SECONDS):
                break
        ending = child.ending()
    except BaseException:
        child.kill()
        child.ending()
        raise
    if ending.exit_code:
        raise _error_of(ending)
    return ending.value


def _error_of(ending: Ending) -> ThalwegError:
    kind: type[ThalwegError] = getattr(errors, ending.kind or ThalwegError.__name__)
    return kind(ending.message)


def _start_server() -> None:
    """Start what processes are forked from.

    It holds the signals that ask to stop: those of a terminal reach every process of it, and this
    one alone is to decide.
    """
    if sys.platform == "win32":
        return
    from multiprocessing import forkserver, resource_tracker

    resource_tracker.ensure_running()  # it lets signals through again
    with stop_signals_held():
        forkserver.ensure_running()


def _end_server() -> None:
    """End what processes are forked from, which may be seconds from hearing of it."""
    if sys.platform == "win32":
        return
    from multiprocessing import forkserver

    server: Any = forkserver
    pid = getattr(server._forkserver, "_forkserver_pid", None)
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


class _Parent:
    """The process that waits for this one: told how it goes, and what came of it."""

    def __init__(self, sending: Connection) -> None:
        self._sending = sending
        self._one_at_a_time = threading.Lock()

    def tell_until_it_ends(self, grace: float) -> None:
        """Tell it signs of life; end this process after it, killed perhaps.

        The system closes the parent's end of a pipe, whatever the parent died of.
        """
        parent = multiprocessing.parent_process()
        assert parent is not None
        while not wait([parent.sentinel], BEAT_SECONDS):
            # A parent that sleeps reads nothing: never wait for it here.
            with self._one_at_a_time, contextlib.suppress(OSError):
                _set_blocking(self._sending, False)
                self._sending.send(processor_time())
        time.sleep(grace)
        os._exit(ORPHANED)

    def tell_the_end(self, ending: Ending) -> None:
        """Nothing is told after it."""
        with self._one_at_a_time, contextlib.suppress(OSError):  # it may be gone
            _set_blocking(self._sending, True)
            self._sending.send(ending)
            self._sending.close()


def _set_blocking(connection: Connection, blocking: bool) -> None:
    if sys.platform != "win32":
        os.set_blocking(connection.fileno(), blocking)


def _call(
    sending: Connection,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    out: Path | None,
    grace: float,
) -> None:
    """What the process does; ends it with the exit status of what happened."""
    parent = _Parent(sending)
    threading.Thread(target=parent.tell_until_it_ends, args=(grace,), daemon=True).start()
    # Ctrl-C reaches every process of the terminal: the parent alone decides, and passes it on.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if grace:
        for number in STOP_SIGNALS:
            if number != signal.SIGINT:
                signal.signal(number, _note_request)
    release_stop_signals()
    try:
        with full_disk_told(out or Path()):
            _redirect_output(out)
            ending = Ending(0, value=function(*arguments))
    except ThalwegError as error:
        ending = Ending.by_error(error)
    except BaseException as error:
        with contextlib.suppress(OSError, ValueError):  # the disk of the log may be full
            traceback.print_exc()  # into the log: not the user's mistake, so the place is wanted
        ending = Ending.by_error(error)
    parent.tell_the_end(ending)
    sys.exit(ending.exit_code)


_requests: list[int] = []


def _note_request(number: int, frame: object) -> None:
    _requests.append(number)


def is_asked_to_stop() -> bool:
    """Whether this process, one with `grace`, has been asked to stop."""
    return bool(_requests)


def _redirect_output(out: Path | None) -> None:
    """Send all output of the process, also that of libraries written in C, to one place."""
    sys.stdout.flush()
    sys.stderr.flush()
    if out is None:
        os.dup2(2, 1)
        return
    descriptor = open_plain(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def _without_word(exit_code: int) -> Ending:
    """The ending of a process that did not come to say what happened."""
    if exit_code == LOST:
        return Ending.from_outside("its process is gone without a word")
    if exit_code >= 0:
        hint = "in a script, call Thalweg below: if __name__ == '__main__'"
        return Ending(exit_code or 1, f"its process ended with status {exit_code}; {hint}")
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = f"signal {-exit_code}"
    if name in OUTSIDE:
        cause = ": out of memory, or killed by hand" if name == "SIGKILL" else ""
        return Ending.from_outside(f"its process was ended by {name}{cause}")
    return Ending(1, f"its process was ended by {name}, a crash")
