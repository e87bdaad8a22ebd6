"""Run the seeds and branches of a study side by side, each in a process of its own.

Small problems are bound by overheads: one thread a process and as many processes as cores was
several times faster than two processes with two threads each. On a GPU one run goes at a time.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess

from thalweg.lab.run_names import TRUNK
from thalweg.lab.spec import Spec
from thalweg.lab.store import StudyFolder

POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Task:
    """One run to be done: a seed of a branch, or of the trunk."""

    seed: int
    branch: str

    @property
    def needs(self) -> Task | None:
        """The run that must be done before this one."""
        return None if self.branch == TRUNK else Task(self.seed, TRUNK)


@dataclass
class Outcome:
    """What became of the tasks: exit statuses, and those never begun for want of their trunk."""

    exit_codes: dict[Task, int] = field(default_factory=dict)
    left_out: list[Task] = field(default_factory=list)
    interrupted: bool = False


def tasks_of(spec: Spec) -> list[Task]:
    """All runs of a study: the trunks first, since the branches wait for them."""
    trunks = [Task(seed, TRUNK) for seed in spec.seeds]
    return trunks + [Task(seed, branch) for seed in spec.seeds for branch in spec.branches]


def usable_cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def context() -> BaseContext:
    """How processes start: forked from a clean server that has imported PyTorch, if there is one.

    Starting one then takes milliseconds instead of the two seconds of the imports.
    """
    if sys.platform == "win32":
        return multiprocessing.get_context("spawn")
    chosen = multiprocessing.get_context("forkserver")
    chosen.set_forkserver_preload(["thalweg.lab.run"])
    return chosen


def run_tasks(
    study: StudyFolder,
    tasks: Sequence[Task],
    *,
    workers: int,
    device: str,
    threads: int,
    plugins: Sequence[str] = (),
    watch: Callable[[Sequence[Task]], None] = lambda running: None,
) -> Outcome:
    """Do the tasks, at most `workers` at a time, each as soon as its trunk is done.

    Ctrl-C and SIGTERM are passed on: each run saves a checkpoint and ends with status 75.

    Args:
        watch: called a few times a second with the running tasks, to show progress.
    """
    from thalweg.lab.worker import work

    # Read by the processes' linear algebra when it is loaded.
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    processes = context()
    waiting = list(tasks)
    running: dict[Task, BaseProcess] = {}
    outcome = Outcome()

    def stop(signum: int, frame: object) -> None:
        outcome.interrupted = True
        for process in running.values():
            process.terminate()

    earlier = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        while waiting or running:
            for task in [t for t, p in running.items() if p.exitcode is not None]:
                process = running.pop(task)
                process.join()
                outcome.exit_codes[task] = process.exitcode or 0
            while len(running) < workers and not outcome.interrupted:
                task = _next_ready(waiting, outcome, set(tasks))
                if task is None:
                    break
                arguments = (str(study.path), task.seed, task.branch, device, threads, plugins)
                process = processes.Process(target=work, args=arguments)  # type: ignore[attr-defined]
                process.start()
                running[task] = process
            if not running:
                break
            watch(list(running))
            time.sleep(POLL_SECONDS)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.join()
        for signum, handler in earlier.items():
            signal.signal(signum, handler)
    outcome.left_out = waiting
    return outcome


def _next_ready(waiting: list[Task], outcome: Outcome, asked: set[Task]) -> Task | None:
    """Take the next task whose trunk is done (in this call, or before it)."""
    for task in waiting:
        needed = task.needs
        if needed is None or needed not in asked or outcome.exit_codes.get(needed) == 0:
            waiting.remove(task)
            return task
    return None
