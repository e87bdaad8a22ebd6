"""The "local" executor: runs side by side on this machine, each in a process of its own."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait

from thalweg.errors import InvalidInput
from thalweg.lab.execution.processes import Child
from thalweg.lab.execution.schedule import Assignment, Outcome, Task, next_ready
from thalweg.lab.execution.worker import work
from thalweg.registry import executors

POLL_SECONDS = 0.1
GRACE_SECONDS = 30.0
"""For a run to save a checkpoint once the study's process is gone; then it ends as if killed."""


@executors.register("local")
def run_in_processes(assignment: Assignment) -> Outcome:
    """Run the tasks in processes of this machine, at most `workers` at a time.

    Ctrl-C and SIGTERM are passed on: each run saves a checkpoint and ends with status 75. Asked a
    second time, they end at once; they continue from their last checkpoint later.

    Raises:
        InvalidInput: the spec holds Python objects, which another process cannot read.
    """
    if assignment.spec is not None:
        raise InvalidInput(
            "executor 'local': the spec holds Python objects, which another process cannot read;"
            " take executor 'inline', or register them in a --plugin file"
        )
    study, device, threads = assignment.study, assignment.device, assignment.threads
    # Read by the processes' linear algebra when it is loaded.
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    waiting = list(assignment.tasks)
    running: dict[Task, Child] = {}
    outcome = Outcome()

    def stop() -> None:
        for child in running.values():
            child.kill() if outcome.interrupted else child.ask_to_stop()
        outcome.interrupted = True

    with on_stop_signals(stop):
        try:
            while waiting or running:
                for task in [task for task, child in running.items() if not child.is_running]:
                    outcome.endings[task] = running.pop(task).ending()
                while len(running) < assignment.workers and not outcome.interrupted:
                    task = next_ready(waiting, outcome, assignment.tasks)
                    if task is None:
                        break
                    plugins = assignment.plugins
                    arguments = (str(study.path), task.seed, task.branch, device, threads, plugins)
                    log = study.run(task.seed, task.branch).path / "log.txt"
                    running[task] = Child(work, arguments, log, grace=GRACE_SECONDS)
                if not running:
                    break
                assignment.watch(list(running))
                wait([child.sentinel for child in running.values()], POLL_SECONDS)
        finally:
            for child in running.values():
                child.ask_to_stop()
            for task, child in running.items():
                outcome.endings[task] = child.ending()
    outcome.left_out = waiting
    return outcome


@contextmanager
def on_stop_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` when a signal asks to; Python hears signals in its main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    names = [name for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
    numbers = [getattr(signal, name) for name in names]
    earlier = {number: signal.signal(number, lambda *_: stop()) for number in numbers}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
