"""The "lockstep" executor: runs that can share a computation make their steps together.

Small models keep a GPU waiting for its next instruction: R runs of one model have the same ones.
Each process takes a group of runs that are ready; those that cannot share go by themselves, as with
the "local" executor. See docs/lockstep.md for which can.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from thalweg.lab.execution.local import run_together
from thalweg.lab.execution.schedule import Assignment, Outcome, Task, no_options, takes_options
from thalweg.lab.preparing import read_spec
from thalweg.lab.sharing import lockstep_of
from thalweg.lab.store import RunFolder
from thalweg.lab.store.checkpoint import list_checkpoints
from thalweg.registry import executors

if TYPE_CHECKING:
    from thalweg.lab.config import PhaseSpec, Spec

LEFT = ("diverged", "failed")
"""States of a run that has left its lockstep before the others."""
MOST_RUNS = 64
"""In one computation: it holds about 10 k numbers for each parameter of each run."""


@executors.register("lockstep")
@takes_options(no_options("lockstep"))
def run_in_lockstep(assignment: Assignment) -> Outcome:
    """Run the tasks in processes of this machine, those that can share a computation together.

    Otherwise as "local": interruptions, retries, runs that others are at work on.

    Raises:
        InvalidInput: the spec holds Python objects, which another process cannot read.
    """
    return run_together(assignment, Grouping(assignment), "lockstep")


class Grouping:
    """Says which of the tasks of an assignment can share a computation, and how many do."""

    def __init__(self, assignment: Assignment) -> None:
        self._assignment = assignment
        self._specs: dict[Path, Spec] = {}

    def key(self, task: Task) -> str:
        """The same for tasks which can share a computation; empty where one goes by itself."""
        study = self._assignment.study_of(task)
        if study.path not in self._specs:
            self._specs[study.path] = read_spec(study)
        spec, run = self._specs[study.path], self._assignment.folder_of(task)
        if reason_alone(spec, task) or began_alone(run):
            return ""
        status, phases = run.status(), task.phases(spec)
        shared = {
            "problem": spec.problem.model_dump(mode="json"),
            "numbers": [spec.dtype, spec.device, str(spec.initial_checkpoint)],
            "subspace": spec.of_branch(task.branch).subspace.model_dump(mode="json"),
            "batch": phases[0].batch_size,
            "bound": [[phase.steps, phase.epochs] for phase in phases],
            # Those of one lockstep go on together; one that has left it by an error, by itself.
            "before": lockstep_of(run),
            "left": status.state if status is not None and status.state in LEFT else "",
        }
        return json.dumps(shared, sort_keys=True)

    def together(self, tasks: Sequence[Task], workers: int) -> int:
        """How many of tasks with one key a process takes: an even share; a lockstep as a whole."""
        if lockstep_of(self._assignment.folder_of(tasks[0])):
            return len(tasks)
        number = min(MOST_RUNS, -(-len(tasks) // workers))
        return number if number > 1 else 0


def began_alone(run: RunFolder) -> bool:
    """Whether a run was begun by itself: it goes on so, to the same bits."""
    return not lockstep_of(run) and bool(list_checkpoints(run.checkpoints))


def usual_executor(device: str, runs: Iterable[RunFolder]) -> str:
    """What runs these runs where nobody says it, by name: "lockstep" or "local".

    On a GPU a step of a small model waits for launches, and one of many such runs for as many.
    Elsewhere what was begun in lockstep goes on so.
    """
    on_gpu = device.startswith("cuda")
    return "lockstep" if on_gpu or any(map(lockstep_of, runs)) else "local"


def reason_alone(spec: Spec, task: Task) -> str:
    """Why a run cannot share a computation with others, by its spec; empty where it can.

    Its data and model may keep it from that as well: that is found out when they are there.
    """
    subspace, phases = spec.of_branch(task.branch).subspace, task.phases(spec)
    if spec.processes > 1:
        return "several processes share it"
    if subspace.source != "tracker":
        return f"subspace source {subspace.source}"
    for key, usual in (("samples", None), ("bulk_error", None), ("every", 1)):
        if (value := getattr(subspace, key)) != usual:
            return f"subspace {key} {value}"
    if subspace.k == "gap":
        return "k by the gap of each seed"
    if len({phase.batch_size for phase in phases}) > 1:
        return "several batch sizes"
    return next(filter(None, map(_reason_of_phase, phases)), "")


def _reason_of_phase(phase: PhaseSpec) -> str:
    optimizer = phase.optimizer
    if optimizer.registered_name != "sgd":
        return f"optimizer {optimizer.registered_name}"
    plain = type(optimizer)(lr=optimizer.lr)
    for key, value in optimizer.model_dump().items():
        if value != getattr(plain, key):
            return f"optimizer with {key}"
    for key in ("clip_norm", "noise", "local"):
        if getattr(phase, key) is not None:
            return key
    if phase.split is not None and phase.split.metric != "euclidean":
        return "split in the optimizer's metric"
    if phase.split is not None and phase.split.source is not None:
        return f"split by {phase.split.source.name}"
    return ""


def runs_in_lockstep(tasks: Sequence[Task], spec_of: Callable[[Task], Spec]) -> str:
    """One line on which runs go in lockstep, and which do not, and why."""
    alone: dict[str, list[str]] = {}
    for task in tasks:
        if reason := reason_alone(spec_of(task), task):
            alone.setdefault(reason, []).append(task.branch)
    together = len(tasks) - sum(map(len, alone.values()))
    why = "; ".join(
        f"{', '.join(dict.fromkeys(branches))}: {reason}" for reason, branches in alone.items()
    )
    line = f"in lockstep: {together} of {len(tasks)} runs, as far as they are ready together"
    return f"{line}; by themselves: {why}" if why else line
