"""What does a queue get? Jobs: the runs of one seed of one study, the trunk and then its branches.

A job needs nothing but its study's folder, so that it can be begun anywhere that sees it, and begun
again: runs that are done are passed over.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from thalweg.lab.execution.schedule import Assignment, Task


@dataclass(frozen=True)
class Job:
    """The runs of one seed of one study.

    Attributes:
        study: its folder.
        seed: of all its runs.
        wave: 0, or one more than that of a job which makes a run that this one copies: jobs of a
            wave begin once those of the waves before have ended.
    """

    study: Path
    seed: int
    wave: int = 0


def jobs_of(assignment: Assignment) -> list[Job]:
    """The jobs of an assignment's tasks, in their order."""
    waves: dict[tuple[Path, int], int] = {}
    for task in assignment.tasks:
        waves.setdefault(_place(assignment, task), 0)
    # A run is the same as one of an earlier point, so that earlier ones are settled by then.
    for task in assignment.tasks:
        place, same = _place(assignment, task), task.same_as
        before = None if same is None else _place(assignment, same)
        if before in waves and before != place:
            waves[place] = max(waves[place], waves[before] + 1)
    return [Job(study, seed, wave) for (study, seed), wave in waves.items()]


def _place(assignment: Assignment, task: Task) -> tuple[Path, int]:
    return assignment.study_of(task).path, task.seed
