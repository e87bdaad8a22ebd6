"""The "local" executor: runs side by side on this machine, each in a process of its own."""

from __future__ import annotations

import os
from collections import Counter
from multiprocessing.connection import wait

from thalweg.errors import InvalidInput
from thalweg.interruption import on_stop_signals
from thalweg.lab.execution.processes import POLL_SECONDS, Child, Ending
from thalweg.lab.execution.schedule import Assignment, Outcome, Task, next_ready
from thalweg.lab.execution.worker import note_killed, work
from thalweg.registry import executors

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
        self._asked = self._passed_on = 0
        self._retried: Counter[Task] = Counter()

    def ask_to_stop(self) -> None:
        """Heard from a signal, at any instant: the next look passes it on."""
        self._asked += 1

    def goes_on(self) -> bool:
        """Look after the processes; whether there is one left."""
        self._pass_requests_on()
        for child in self.running.values():
            child.kill_if_hung(self.assignment.hung_after)
        for task in [task for task, child in self.running.items() if not child.is_running]:
            self._note(task, self.running.pop(task).ending())
        self._begin()
        return bool(self.running)

    def leave(self) -> None:
        """Stop what still runs, after an error here."""
        for child in self.running.values():
            child.ask_to_stop()
        for task, child in self.running.items():
            self.outcome.endings[task] = child.ending()

    def _pass_requests_on(self) -> None:
        while self._passed_on < self._asked:
            for child in self.running.values():
                child.kill() if self._passed_on else child.ask_to_stop()
            self._passed_on += 1
            self.outcome.interrupted = True

    def _note(self, task: Task, ending: Ending) -> None:
        if ending.killed:
            note_killed(self.assignment.study.run(task.seed, task.branch), ending.message)
        times = self.assignment.retries
        if ending.killed and not self._asked and self._retried[task] < times:
            self._retried[task] += 1
            count = f"{self._retried[task]} of {times}"
            again = f"begun again from its last checkpoint ({count})"
            self.assignment.say(f"{task}: killed: {ending.message}; {again}")
            self.outcome.left_out.insert(0, task)
        else:
            self.outcome.endings[task] = ending

    def _begin(self) -> None:
        """Begin what has its start, as far as there are workers."""
        todo, waiting = self.assignment, self.outcome.left_out
        while len(self.running) < todo.workers and not self._asked:
            task = next_ready(waiting, self.outcome, todo.tasks)
            if task is None:
                return
            arguments = (
                *(str(todo.study.path), task.seed, task.branch),
                *(todo.device, todo.threads, todo.plugins),
            )
            log = todo.study.run(task.seed, task.branch).path / "log.txt"
            try:
                self.running[task] = Child(work, arguments, log, grace=GRACE_SECONDS)
            except (EOFError, ConnectionError, BlockingIOError) as error:
                why = f"no process could be started for it ({type(error).__name__}: {error})"
                self._note(task, Ending.from_outside(why))
