"""In which order do the runs of a study go? Side by side, each in a process of its own."""

from __future__ import annotations

import heapq
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import wait

from thalweg.lab.config import TRUNK, PhaseSpec, Spec
from thalweg.lab.execution.processes import Child, Ending
from thalweg.lab.store import StudyFolder

POLL_SECONDS = 0.1
GRACE_SECONDS = 30.0
"""For a run to save a checkpoint once the study's process is gone; then it ends as if killed."""
STEPS_OF_A_SOLVE = 20
"""Solving for S_k takes about as many products as following it for so many steps."""


@dataclass(frozen=True)
class Task:
    """One run to be done: a seed of a branch, or of the trunk.

    Attributes:
        after: the run at whose end a branch starts: the trunk, or another branch.
    """

    seed: int
    branch: str
    after: str = field(default=TRUNK, compare=False)

    @property
    def needs(self) -> Task | None:
        """The run that must be done before this one."""
        return None if self.branch == TRUNK else Task(self.seed, self.after)

    def phases(self, spec: Spec) -> tuple[PhaseSpec, ...]:
        """What the run goes through."""
        return spec.phases if self.branch == TRUNK else (spec.branch_phase(self.branch),)

    def most_steps(self, spec: Spec, num_samples: int) -> int:
        """The bound on the steps that the run makes itself, over `num_samples` samples."""
        return sum(phase.most_steps(num_samples) for phase in self.phases(spec))

    def __str__(self) -> str:
        return f"seed {self.seed} {self.branch}"


@dataclass
class Outcome:
    """What became of the tasks: how each ended, and those never begun for want of their start."""

    endings: dict[Task, Ending] = field(default_factory=dict)
    left_out: list[Task] = field(default_factory=list)
    interrupted: bool = False

    @property
    def exit_code(self) -> int:
        """0: all done; 75: interrupted; else the first failure's."""
        unfinished = self.left_out or any(e.exit_code for e in self.endings.values())
        if self.interrupted and unfinished:
            return 75
        return next((e.exit_code for e in self.endings.values() if e.exit_code), 0)


def tasks_of(spec: Spec, seeds: Sequence[int] | None = None) -> list[Task]:
    """All runs of a study, or of some seeds: the trunks first, since the branches wait for them."""
    seeds = spec.seeds if seeds is None else seeds
    trunks = [Task(seed, TRUNK) for seed in seeds]
    return trunks + [
        Task(seed, name, branch.after or TRUNK)
        for seed in seeds
        for name, branch in spec.branches.items()
    ]


def longest_first(spec: Spec, tasks: Sequence[Task], num_samples: int) -> list[Task]:
    """The tasks by the steps to the end of all that waits for them: cores stay busy to the end.

    Steps are those that follow a subspace; one that solves for it counts as many.
    """
    path: dict[Task, float] = {}
    following = {task: [t for t in tasks if t.needs == task] for task in tasks}

    def steps(task: Task) -> float:
        if task not in path:
            subspace = spec.of_branch(task.branch).subspace
            solves = subspace.source in ("exact", "next")
            weight = 1 + STEPS_OF_A_SOLVE / subspace.every if solves else 1
            after = max(map(steps, following[task]), default=0.0)
            path[task] = weight * task.most_steps(spec, num_samples) + after
        return path[task]

    return sorted(tasks, key=lambda task: -steps(task))


def makespan(durations: Mapping[Task, float], workers: int) -> float:
    """When the last task is done, each begun in order as soon as a worker and its start are."""
    free = [0.0] * max(1, workers)
    done: dict[Task, float] = {}
    for task in sorted(durations, key=lambda task: task.branch != TRUNK):
        ready = done.get(task.needs, 0.0) if task.needs else 0.0
        done[task] = max(heapq.heappop(free), ready) + durations[task]
        heapq.heappush(free, done[task])
    return max(done.values(), default=0.0)


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
    """Do the tasks, at most `workers` at a time, each as soon as the run it starts after is done.

    Ctrl-C and SIGTERM are passed on: each run saves a checkpoint and ends with status 75; asked a
    second time, they end at once (and go on from their last checkpoint later).

    Args:
        watch: called a few times a second with the running tasks, to show progress.
    """
    from thalweg.lab.execution.worker import work

    # Read by the processes' linear algebra when it is loaded.
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    waiting = list(tasks)
    running: dict[Task, Child] = {}
    outcome = Outcome()

    def stop() -> None:
        for child in running.values():
            child.kill() if outcome.interrupted else child.ask_to_stop()
        outcome.interrupted = True

    with _on_stop_signals(stop):
        try:
            while waiting or running:
                for task in [task for task, child in running.items() if not child.is_running]:
                    outcome.endings[task] = running.pop(task).ending()
                while len(running) < workers and not outcome.interrupted:
                    task = _next_ready(waiting, outcome, set(tasks))
                    if task is None:
                        break
                    arguments = (str(study.path), task.seed, task.branch, device, threads, plugins)
                    log = study.run(task.seed, task.branch).path / "log.txt"
                    running[task] = Child(work, arguments, log, grace=GRACE_SECONDS)
                if not running:
                    break
                watch(list(running))
                wait([child.sentinel for child in running.values()], POLL_SECONDS)
        finally:
            for child in running.values():
                child.ask_to_stop()
            for task, child in running.items():
                outcome.endings[task] = child.ending()
    outcome.left_out = waiting
    return outcome


@contextmanager
def _on_stop_signals(stop: Callable[[], None]) -> Iterator[None]:
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


def _next_ready(waiting: list[Task], outcome: Outcome, asked: set[Task]) -> Task | None:
    """Take the next task whose start is done (in this call, or before it)."""
    done = {task for task, ending in outcome.endings.items() if ending.exit_code == 0}
    for task in waiting:
        needed = task.needs
        if needed is None or needed not in asked or needed in done:
            waiting.remove(task)
            return task
    return None
