"""Whose is a run? That of the process which holds its lock, until it is done.

Several processes, on one machine or on many with a shared folder, can so do the runs of one study
or sweep together: each begins those that nobody is at work on.
"""

from __future__ import annotations

from thalweg.errors import ThalwegError
from thalweg.lab.config import TRUNK
from thalweg.lab.execution.schedule import Assignment, Task
from thalweg.lab.identity import bound_text
from thalweg.lab.sharing import copied
from thalweg.lab.store import RunFolder
from thalweg.lab.store.checkpoint import list_checkpoints, read_mark
from thalweg.lab.store.lock import is_locked
from thalweg.lab.store.verifying import read_run_table


def is_claimed(run: RunFolder) -> bool:
    """Whether a process is at work on the run."""
    return is_locked(run.path)


def is_done(run: RunFolder) -> bool:
    """Whether the run has come to the end that its `run.toml` asks for.

    A run that cannot be read is not: whoever begins it says what is wrong.
    """
    try:
        status = run.status()
        if status is None or status.state != "done":
            return False
        return run.branch == TRUNK or _bound_made(run) in ("", _bound_asked(run))
    except (ThalwegError, OSError):
        return False


def found_done(assignment: Assignment, task: Task) -> bool:
    """Whether a task is done without being run: it is done already, or copied from the same run."""
    run = assignment.folder_of(task)
    if is_done(run):
        return True
    return task.same_as is not None and copied(assignment.folder_of(task.same_as), run)


def _bound_made(run: RunFolder) -> str:
    """The bound of its last phase that a done run was made with; empty where it is not known."""
    known = list_checkpoints(run.checkpoints)
    return read_mark(known[-1]).bound if known else ""


def _bound_asked(run: RunFolder) -> str:
    phases = read_run_table(run).get("phases")
    last = phases[-1] if isinstance(phases, list) and phases else None
    return bound_text(last.get("steps"), last.get("epochs")) if isinstance(last, dict) else ""
