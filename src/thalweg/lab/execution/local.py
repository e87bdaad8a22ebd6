"""The "local" executor: runs side by side on this machine, each in a process of its own.

Or several in one, where they can share a computation: see `lockstep.py`.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence
from multiprocessing.connection import wait
from typing import Protocol

from thalweg.errors import Diverged, InUse
from thalweg.interruption import on_stop_signals
from thalweg.lab.execution.claiming import found_done, is_claimed
from thalweg.lab.execution.processes import POLL_SECONDS, Child, Ending
from thalweg.lab.execution.schedule import (
    Assignment,
    Outcome,
    Task,
    next_ready,
    no_options,
    refuse_objects,
    takes_options,
)
from thalweg.lab.execution.worker import note_killed, work, work_together
from thalweg.lab.store import RunFolder
from thalweg.registry import executors

Group = tuple[Task, *tuple[Task, ...]]
"""What one process is at work on."""
GRACE_SECONDS = 30.0
"""For a run to save a checkpoint once the study's process is gone; then it ends as if killed."""
LOOK_SECONDS = 1.0
"""Between two looks at runs that other processes are at work on."""


@executors.register("local")
@takes_options(no_options("local"))
def run_in_processes(assignment: Assignment) -> Outcome:
    """Run the tasks in processes of this machine, at most `workers` at a time.

    Ctrl-C and SIGTERM are passed on: each run saves a checkpoint and ends with status 75. Asked a
    second time, they end at once; they continue from their last checkpoint later.

    A run that another process is at work on is left to it, and waited for; one that is the same as
    a done one is copied.

    Raises:
        InvalidInput: the spec holds Python objects, which another process cannot read.
    """
    return run_together(assignment, Apart(), "local")


class Sharing(Protocol):
    """Says which tasks one process takes together."""

    def key(self, task: Task) -> str:
        """The same for tasks which can share a process; empty where one goes by itself."""
        ...

    def together(self, tasks: Sequence[Task], workers: int) -> int:
        """How many of these tasks, which share a key and are ready, one process takes.

        Args:
            workers: how many processes may begin now.

        Returns:
            The first so many; 0: the first one, by itself.
        """
        ...


class Apart:
    """Every task goes by itself."""

    def key(self, task: Task) -> str:
        """None is shared."""
        return ""

    def together(self, tasks: Sequence[Task], workers: int) -> int:
        """The first one alone."""
        return 0


def run_together(assignment: Assignment, sharing: Sharing, executor: str) -> Outcome:
    """The same, with several runs in a process where `sharing` says so.

    Args:
        executor: its name.
    """
    refuse_objects(assignment, executor)
    # Read by the processes' linear algebra when it is loaded.
    os.environ.setdefault("OMP_NUM_THREADS", str(assignment.threads))
    crew = _Crew(assignment, sharing)
    with on_stop_signals(crew.ask_to_stop):
        try:
            while crew.goes_on():
                assignment.watch([task for group in crew.running for task in group])
                wait([child.sentinel for child in crew.running.values()], POLL_SECONDS)
        finally:
            crew.leave()
    return crew.outcome


class _Crew:
    """The processes of an assignment: begun, asked to stop, ended where they hang, begun again."""

    def __init__(self, assignment: Assignment, sharing: Sharing) -> None:
        self.assignment = assignment
        self.running: dict[Group, Child] = {}
        self._sharing = sharing
        self._apart: set[Task] = set()
        self.outcome = Outcome(left_out=list(assignment.tasks))
        self._tasks = frozenset(assignment.tasks)
        self._asked = self._passed_on = 0
        self._retried: Counter[Task] = Counter()
        self._elsewhere: dict[Task, None] = {}
        self._looked = time.monotonic()

    def ask_to_stop(self) -> None:
        """Heard from a signal, at any instant: the next look passes it on."""
        self._asked += 1

    def goes_on(self) -> bool:
        """Look after the processes; whether there is something left to wait for."""
        self._pass_requests_on()
        for child in self.running.values():
            child.kill_if_hung(self.assignment.hung_after)
        for group in [group for group, child in self.running.items() if not child.is_running]:
            self._note_all(group, self.running.pop(group).ending())
        self._look_elsewhere()
        self._begin()
        return bool(self.running) or bool(self._elsewhere and not self._asked)

    def leave(self) -> None:
        """Stop what still runs, after an error here."""
        for child in self.running.values():
            child.ask_to_stop()
        for group, child in self.running.items():
            for task, ending in zip(group, _endings(group, child.ending()), strict=True):
                self.outcome.endings[task] = ending
        self.outcome.left_out += self._elsewhere

    def _pass_requests_on(self) -> None:
        while self._passed_on < self._asked:
            for child in self.running.values():
                child.kill() if self._passed_on else child.ask_to_stop()
            self._passed_on += 1
            self.outcome.interrupted = True

    def _note_all(self, group: Group, ending: Ending) -> None:
        if isinstance(ending.value, str):
            self.assignment.say(f"{len(group)} runs go by themselves: {ending.value}")
            self._apart.update(group)
            self.outcome.left_out[:0] = group
            return
        for task, each in zip(group, _endings(group, ending), strict=True):
            shared = each.killed and len(group) > 1
            own = _own_ending(self.assignment.folder_of(task)) if shared else None
            self._note(task, own or each)

    def _note(self, task: Task, ending: Ending) -> None:
        if ending.kind == InUse.__name__:
            self._leave_to_others(task)
            return
        if ending.killed:
            note_killed(self.assignment.folder_of(task), ending.message)
        times = self.assignment.retries
        if ending.killed and not self._asked and self._retried[task] < times:
            self._retried[task] += 1
            count = f"{self._retried[task]} of {times}"
            again = f"begun again from its last checkpoint ({count})"
            self.assignment.say(f"{task}: killed: {ending.message}; {again}")
            self.outcome.left_out.insert(0, task)
        else:
            self.outcome.endings[task] = ending

    def _leave_to_others(self, task: Task) -> None:
        if task not in self._elsewhere:
            self.assignment.say(f"{task}: another process is at work on it")
        self._elsewhere[task] = None

    def _look_elsewhere(self) -> None:
        """Take the runs back that other processes have left; those done are found so."""
        if not self._elsewhere or time.monotonic() - self._looked < LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        for task in [t for t in self._elsewhere if not is_claimed(self.assignment.folder_of(t))]:
            del self._elsewhere[task]
            self.outcome.left_out.insert(0, task)

    def _begin(self) -> None:
        """Begin what has its start, as far as there are workers."""
        while (free := self.assignment.workers - len(self.running)) > 0 and not self._asked:
            if (task := self._next(self.outcome.left_out)) is None:
                return
            key = "" if task in self._apart else self._sharing.key(task)
            others = self._others(key) if key else []
            number = self._sharing.together([task, *others], free) if key else 0
            more = max(0, number - 1)
            self.outcome.left_out[:0] = others[more:]
            self._start((task, *others[:more]), together=number > 0)

    def _next(self, waiting: list[Task]) -> Task | None:
        """The next task that is to be run here, taken off the waiting ones; None without one."""
        todo = self.assignment
        while (task := next_ready(waiting, self.outcome, self._tasks)) is not None:
            if is_claimed(todo.folder_of(task)):
                self._leave_to_others(task)
            elif found_done(todo, task):
                self.outcome.endings[task] = Ending(0)
            else:
                return task
        return None

    def _others(self, key: str) -> list[Task]:
        """Those of the waiting tasks that can begin and have this key, taken off them."""
        waiting = self.outcome.left_out
        like = [t for t in waiting if t not in self._apart and self._sharing.key(t) == key]
        found: list[Task] = []
        while (task := self._next(like)) is not None:
            found.append(task)
        # Also those that are done, or that others are at work on.
        gone = {*found, *self.outcome.endings, *self._elsewhere}
        self.outcome.left_out = [task for task in waiting if task not in gone]
        return found

    def _start(self, group: Group, *, together: bool) -> None:
        todo = self.assignment
        means = (todo.device, todo.threads, todo.plugins)
        runs = [(str(todo.study_of(task).path), task.seed, task.branch) for task in group]
        function, arguments = (
            (work_together, (runs, *means)) if together else (work, runs[0] + means)
        )
        log = todo.folder_of(group[0]).path / "log.txt"
        try:
            self.running[group] = Child(function, arguments, log, grace=GRACE_SECONDS)
        except (EOFError, ConnectionError, BlockingIOError) as error:
            why = f"no process could be started for it ({type(error).__name__}: {error})"
            self._note_all(group, Ending.from_outside(why))


def _own_ending(folder: RunFolder) -> Ending | None:
    """How a run had ended before its process, which others shared, was killed; None if it had not.

    One that was done is found so where it is begun again.
    """
    status = folder.status()
    if status is not None and status.state == "diverged":
        return Ending.by_error(Diverged(status.message or ""))
    return Ending(1, status.message or "") if status and status.state == "failed" else None


def _endings(group: Group, ending: Ending) -> list[Ending]:
    """How each run of a group ended, by how their process did."""
    if ending.exit_code == 0 and isinstance(ending.value, list):
        return [Ending(*each) for each in ending.value]
    return [ending for _ in group]
