"""The "inline" executor: one run after another, in this process.

For specs that hold Python objects (a model, a loss or data made in a script), for a debugger, and
where no process may be started.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from thalweg.errors import ThalwegError
from thalweg.interruption import on_stop_signals
from thalweg.lab.execution.claiming import found_done
from thalweg.lab.execution.processes import Ending
from thalweg.lab.execution.schedule import (
    Assignment,
    Outcome,
    Task,
    next_ready,
    no_options,
    takes_options,
)
from thalweg.lab.execution.worker import execute_run
from thalweg.registry import executors

WATCH_SECONDS = 0.1


@executors.register("inline")
@takes_options(no_options("inline"))
def run_inline(assignment: Assignment) -> Outcome:
    """Run the tasks one after another in this process, whatever `workers` says.

    The first Ctrl-C or SIGTERM makes the run save a checkpoint and end with status 75, the second
    ends it at once. PyTorch's threads and random state are put back afterwards. A run that hangs or
    is killed takes this process with it: nothing is noticed, or begun again.
    """
    return one_after_another(assignment)


def one_after_another(
    assignment: Assignment,
    begin: Callable[[Task], None] = lambda task: None,
    goes_on: Callable[[Ending], bool] = lambda ending: True,
) -> Outcome:
    """See `run_inline`.

    Args:
        begin: called before each task.
        goes_on: whether others may follow one that has ended like that.
    """
    waiting = list(assignment.tasks)
    outcome = Outcome()

    def stop() -> None:
        if outcome.interrupted:
            raise KeyboardInterrupt
        outcome.interrupted = True

    with on_stop_signals(stop), _own_torch_state(assignment.device):
        while not outcome.interrupted:
            task = next_ready(waiting, outcome, assignment.tasks)
            if task is None:
                break
            assignment.watch([task])
            if found_done(assignment, task):
                outcome.endings[task] = Ending(0)
                continue
            begin(task)
            ending = _ending(assignment, task, lambda: outcome.interrupted)
            outcome.endings[task] = ending
            if not goes_on(ending):
                break
    outcome.left_out = waiting
    return outcome


def _ending(assignment: Assignment, task: Task, interrupted: Callable[[], bool]) -> Ending:
    """How a task ends that is run now."""
    shown = time.monotonic()

    def should_stop() -> bool:
        nonlocal shown
        if time.monotonic() - shown >= WATCH_SECONDS:
            shown = time.monotonic()
            assignment.watch([task])
        return interrupted()

    try:
        execute_run(
            assignment.study_of(task),
            task.seed,
            task.branch,
            assignment.device,
            assignment.threads,
            assignment.plugins,
            should_stop,
            spec=assignment.spec,
        )
    except ThalwegError as error:
        return Ending.by_error(error)
    except KeyboardInterrupt:
        return Ending(75, "ended at once")
    except Exception as error:
        with suppress(ThalwegError, OSError):
            # Not the user's mistake, so the place is wanted.
            assignment.folder_of(task).log(traceback.format_exc())
        return Ending.by_error(error)
    return Ending(0)


@contextmanager
def _own_torch_state(device: str) -> Iterator[None]:
    """Put back the threads and random generators of this process afterwards."""
    import torch

    threads = torch.get_num_threads()
    gpus = [torch.device(device)] if device.startswith("cuda") else []
    try:
        with torch.random.fork_rng(gpus):
            yield
    finally:
        torch.set_num_threads(threads)
