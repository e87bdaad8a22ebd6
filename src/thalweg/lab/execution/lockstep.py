"""The "lockstep" executor: runs that can share a computation make their steps together.

Small models keep a GPU waiting for its next instruction: R runs of one model have the same ones.
Each process takes a group of runs that are ready; those that cannot share go by themselves, as with
the "local" executor. See docs/lockstep.md for which can.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from thalweg.lab.execution.local import run_together
from thalweg.lab.execution.schedule import Assignment, Outcome, Task
from thalweg.lab.preparing import read_spec
from thalweg.lab.sharing import lockstep_of
from thalweg.registry import executors

if TYPE_CHECKING:
    from thalweg.lab.config import PhaseSpec, Spec


@executors.register("lockstep")
def run_in_lockstep(assignment: Assignment) -> Outcome:
    """Run the tasks in processes of this machine, those that can share a computation together.

    Otherwise as "local": interruptions, retries, runs that others are at work on.

    Raises:
        InvalidInput: the spec holds Python objects, which another process cannot read; an option.
    """
    return run_together(assignment, Grouping(assignment), "lockstep")


class Grouping:
    """Says which of the tasks of an assignment can share a computation."""

    def __init__(self, assignment: Assignment) -> None:
        self._assignment = assignment
        self._specs: dict[object, Spec] = {}

    def __call__(self, task: Task) -> str:
        """A key that is the same for tasks which can; empty where one goes by itself."""
        study = self._assignment.study_of(task)
        spec = self._specs.setdefault(study.path, read_spec(study))
        if reason_alone(spec, task):
            return ""
        run = self._assignment.folder_of(task)
        status = run.status()
        own = spec.of_branch(task.branch)
        phases = task.phases(spec)
        shared = {
            "problem": spec.problem.model_dump(mode="json"),
            "numbers": [spec.dtype, spec.device, str(spec.initial_checkpoint)],
            "subspace": own.subspace.model_dump(mode="json"),
            "batch": phases[0].batch_size,
            "bound": [[phase.steps, phase.epochs] for phase in phases],
            # Those of one lockstep go on together; one that diverged does so again, by itself.
            "before": lockstep_of(run),
            "diverged": status is not None and status.state == "diverged",
        }
        return json.dumps(shared, sort_keys=True)


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


def runs_in_lockstep(spec: Spec, tasks: Sequence[Task]) -> str:
    """One line on which runs go in lockstep, and which do not, and why."""
    alone: dict[str, list[str]] = {}
    for task in tasks:
        if reason := reason_alone(spec, task):
            alone.setdefault(reason, []).append(task.branch)
    together = len(tasks) - sum(map(len, alone.values()))
    why = "; ".join(
        f"{', '.join(dict.fromkeys(branches))}: {reason}" for reason, branches in alone.items()
    )
    line = f"in lockstep: {together} of {len(tasks)} runs, as far as they are ready together"
    return f"{line}; by themselves: {why}" if why else line
