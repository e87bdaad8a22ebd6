"""A grid of small studies that any worker can be set to, and what it left.

    python -m tests.lab.execution.small_grid FOLDER EXECUTOR KEY=VALUE ...

does all that is left of it, as a driver that can be killed.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.lab.small_study import begin, small_spec
from thalweg.lab.execution.schedule import Task, run_tasks
from thalweg.lab.sharing import tasks_in_folder
from thalweg.lab.store import RunFolder, StudyFolder

STEPS = 500


def begin_grid(
    folder: Path, *, rates: Sequence[float] = (0.05, 0.1), batches: Sequence[int] = (10, 20)
) -> list[Task]:
    """A study for each learning rate and batch size, two seeds of a trunk and a branch each."""
    for lr, batch in itertools.product(rates, batches):
        changes: dict[str, Any] = {
            "seeds": [0, 1],
            "phases.0.steps": STEPS,
            "phases.0.optimizer.lr": lr,
            "phases.0.batch_size": batch,
            "branches": {"sgd": {"steps": 4}},
            "probes": {"loss": 1},
            "checkpoint.every_steps": 50,
        }
        begin(folder / f"lr-{lr}-batch-{batch}", small_spec(changes))
    return tasks_of_grid(folder)


def tasks_of_grid(folder: Path) -> list[Task]:
    """All runs of the grid."""
    found: list[Task] = []
    for study in sorted(file.parent for file in folder.glob("*/spec.toml")):
        spec = small_spec({"seeds": [0, 1], "branches": {"sgd": {"steps": 4}}})
        found += tasks_in_folder(StudyFolder(study), spec, spec.seeds)
    return found


def folders_of(tasks: Sequence[Task]) -> list[RunFolder]:
    """Where the runs are."""
    return [StudyFolder(t.study).run(t.seed, t.branch) for t in tasks if t.study is not None]


def is_under_way(run: RunFolder) -> bool:
    """Whether the run has made steps, and is at it."""
    status = run.status()
    return status is not None and status.state == "running" and status.step > 0


def not_made_once(tasks: Sequence[Task]) -> dict[str, list[str]]:
    """The logs of the runs that are not done, or were begun or ended twice."""
    found: dict[str, list[str]] = {}
    for run in folders_of(tasks):
        file, status = run.path / "log.txt", run.status()
        lines = [line.partition(" ")[2] for line in file.read_text().splitlines() if file.exists()]
        begun = sum(line.startswith("started at step") for line in lines)
        ended = sum(line.startswith("done at step") for line in lines)
        if (begun, ended) != (1, 1) or status is None or status.state != "done":
            found[str(run.path)] = lines
    return found


def was_interrupted(tasks: Sequence[Task]) -> bool:
    """Whether a run was gone on with, somewhere."""
    return any("resumed at step" in (r.path / "log.txt").read_text() for r in folders_of(tasks))


def drive(folder: Path, executor: str, options: Sequence[str]) -> int:
    """Do all that is left, with a line for each thing that is said."""
    outcome = run_tasks(
        StudyFolder(folder),
        tasks_of_grid(folder),
        workers=2,
        device="cpu",
        threads=1,
        executor=executor,
        say=_say,
        options=dict(option.split("=", 1) for option in options),
    )
    for task, ending in outcome.endings.items():
        if ending.exit_code:
            _say(f"{task}: {ending.exit_code} {ending.message}")
    return outcome.exit_code


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(drive(Path(sys.argv[1]), sys.argv[2], sys.argv[3:]))
