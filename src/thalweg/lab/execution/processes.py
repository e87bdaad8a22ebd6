"""How is a function called in a process of its own, and how did that end?

A crash, or running out of memory, ends that process alone. Processes are forked from a clean server
that has imported PyTorch, where there is one: starting one then takes milliseconds instead of the
four seconds of the imports. A process does not outlive the one that started it, however that ends.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

from thalweg.errors import ThalwegError
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


@dataclass(frozen=True)
class Ending:
    """How a process ended.

    Attributes:
        exit_code: 0, the `exit_code` of the error, or 1 for an error that was nobody's intention.
        message: of the error, one line or more.
        value: what the function returned.
    """

    exit_code: int
    message: str = ""
    value: Any = None


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
        self._receiving, sending = chosen.Pipe(duplex=False)
        self._process = chosen.Process(  # type: ignore[attr-defined]
            target=_call, args=(sending, function, arguments, output, grace)
        )
        self._process.start()
        sending.close()

    @property
    def pid(self) -> int | None:
        """The number of the process."""
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.exitcode is None

    @property
    def sentinel(self) -> int:
        """What `multiprocessing.connection.wait` waits for: the end of the process."""
        return self._process.sentinel

    def ask_to_stop(self) -> None:
        """Send SIGTERM: a run saves a checkpoint and ends."""
        self._process.terminate()

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()

    def ending(self) -> Ending:
        """Wait for the end, and say what it was."""
        try:
            # Read first: a process with much to return waits until it is read.
            ending = self._receiving.recv()
        except EOFError:
            ending = None
        self._process.join()
        self._receiving.close()
        return ending or _without_word(self._process.exitcode or 0)


def call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """What the function returns, called in a process of its own.

    Raises:
        ThalwegError: of the class that the function raised; its base class for other errors.
    """
    child = Child(function, arguments)
    try:
        ending = child.ending()
    except BaseException:
        child.kill()
        raise
    if ending.exit_code:
        raise _error_of(ending)
    return ending.value


def _error_of(ending: Ending) -> ThalwegError:
    classes = {kind.exit_code: kind for kind in ThalwegError.__subclasses__()}
    return classes.get(ending.exit_code, ThalwegError)(ending.message)


def _call(
    sending: Connection,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    out: Path | None,
    grace: float,
) -> None:
    """What the process does; ends it with the exit status of what happened."""
    threading.Thread(target=_end_with_parent, args=(grace,), daemon=True).start()
    # Ctrl-C reaches every process of the terminal: the parent alone decides, and passes it on.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _redirect_output(out)
    try:
        ending = Ending(0, value=function(*arguments))
    except ThalwegError as error:
        ending = Ending(error.exit_code, str(error))
    except BaseException as error:
        traceback.print_exc()  # into the log: not the user's mistake, so the place is wanted
        ending = Ending(1, " ".join(f"{type(error).__name__}: {error}".split()))
    sending.send(ending)
    sending.close()
    sys.exit(ending.exit_code)


def _end_with_parent(grace: float) -> None:
    """Wait for the end of the parent, killed perhaps, and end this process after it.

    The system closes the parent's end of a pipe, whatever the parent died of.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    time.sleep(grace)
    os._exit(ORPHANED)


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
    if exit_code >= 0:
        hint = "in a script, call Thalweg below: if __name__ == '__main__'"
        return Ending(exit_code or 1, f"its process ended with status {exit_code}; {hint}")
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = f"signal {-exit_code}"
    cause = ": out of memory, or killed by hand" if name == "SIGKILL" else ""
    return Ending(1, f"its process was ended by {name}{cause}")
