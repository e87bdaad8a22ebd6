"""The "local" executor: runs side by side on this machine, each in a process of its own."""

from __future__ import annotations

import os
import time
from collections import Counter
from multiprocessing.connection import wait

from thalweg.errors import InUse
from thalweg.interruption import on_stop_signals
from thalweg.lab.execution.claiming import found_done, is_claimed
from thalweg.lab.execution.processes import POLL_SECONDS, Child, Ending
from thalweg.lab.execution.schedule import (
    Assignment,
    Outcome,
    Task,
    next_ready,
    refuse_objects,
    refuse_options,
)
from thalweg.lab.execution.worker import note_killed, work
from thalweg.lab.store import RunFolder
from thalweg.registry import executors

GRACE_SECONDS = 30.0
"""For a run to save a checkpoint once the study's process is gone; then it ends as if killed."""
LOOK_SECONDS = 1.0
"""Between two looks at runs that other processes are at work on."""


@executors.register("local")
def run_in_processes(assignment: Assignment) -> Outcome:
    """Run the tasks in processes of this machine, at most `workers` at a time.

    Ctrl-C and SIGTERM are passed on: each run saves a checkpoint and ends with status 75. Asked a
    second time, they end at once; they continue from their last checkpoint later.

    A run that another process is at work on is left to it, and waited for; one that is the same as
    a done one is copied.

    Raises:
        InvalidInput: the spec holds Python objects, which another process cannot read; an option.
    """
    refuse_objects(assignment, "local")
    refuse_options(assignment, "local")
    # Read by the processes' linear algebra when it is loaded.
    os.environ.setdefault("OMP_NUM_THREADS", str(assignment.threads))
    crew = _Crew(assignment)
    with on_stop_signals(crew.ask_to_stop):
        try:
            while crew.goes_on():
                assignment.watch(list(crew.running))
                wait([child.sentinel for child in crew.running.values()], POLL_SECONDS)
        finally:
            crew.leave()
    return crew.outcome


class _Crew:
    """The processes of an assignment: begun, asked to stop, ended where they hang, begun again."""

    def __init__(self, assignment: Assignment) -> None:
        self.assignment = assignment
        self.running: dict[Task, Child] = {}
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
        for task in [task for task, child in self.running.items() if not child.is_running]:
            self._note(task, self.running.pop(task).ending())
        self._look_elsewhere()
        self._begin()
        return bool(self.running) or bool(self._elsewhere and not self._asked)

    def leave(self) -> None:
        """Stop what still runs, after an error here."""
        for child in self.running.values():
            child.ask_to_stop()
        for task, child in self.running.items():
            self.outcome.endings[task] = child.ending()
        self.outcome.left_out += self._elsewhere

    def _pass_requests_on(self) -> None:
        while self._passed_on < self._asked:
            for child in self.running.values():
                child.kill() if self._passed_on else child.ask_to_stop()
            self._passed_on += 1
            self.outcome.interrupted = True

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
        todo, waiting = self.assignment, self.outcome.left_out
        while len(self.running) < todo.workers and not self._asked:
            task = next_ready(waiting, self.outcome, self._tasks)
            if task is None:
                return
            folder = todo.folder_of(task)
            if is_claimed(folder):
                self._leave_to_others(task)
            elif found_done(todo, task):
                self.outcome.endings[task] = Ending(0)
            else:
                self._start(task, folder)

    def _start(self, task: Task, folder: RunFolder) -> None:
        todo = self.assignment
        arguments = (
            *(str(todo.study_of(task).path), task.seed, task.branch),
            *(todo.device, todo.threads, todo.plugins),
        )
        try:
            self.running[task] = Child(
                work, arguments, folder.path / "log.txt", grace=GRACE_SECONDS
            )
        except (EOFError, ConnectionError, BlockingIOError) as error:
            why = f"no process could be started for it ({type(error).__name__}: {error})"
            self._note(task, Ending.from_outside(why))
