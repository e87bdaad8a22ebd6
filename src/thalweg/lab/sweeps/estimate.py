"""What would a sweep take? Runs, disk and time, before anything is begun.

The time is that of a trial: the first run of the first point, for some seconds, in a folder that is
thrown away.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from thalweg.lab.config import TRUNK, Spec, dump_spec
from thalweg.lab.execution.machine import default_workers, resolve_device
from thalweg.lab.execution.processes import POLL_SECONDS, Child
from thalweg.lab.execution.schedule import Task, tasks_of
from thalweg.lab.execution.worker import work
from thalweg.lab.means import Means
from thalweg.lab.preparing import create_runs, disk_of, is_missing, with_absolute_paths
from thalweg.lab.problem_facts import ProblemFacts, with_way_to_multiply
from thalweg.lab.progress import duration
from thalweg.lab.sharing import this_maker
from thalweg.lab.store import StudyFolder
from thalweg.lab.store.durable import format_bytes, free_bytes
from thalweg.lab.sweeps.running import facts_of, sweep_of
from thalweg.lab.sweeps.specs import SweepSpecs

TRIAL_SECONDS = 10.0


@dataclass(frozen=True)
class Estimate:
    """What a sweep would take.

    Attributes:
        path: its folder.
        points, runs, done: how many there are, and how many of the runs are done already.
        disk, free: bytes that would be written at the most, and that are free.
        seconds_of_one: the time of one run, on average; None where it could not be tried.
        seconds: the time of all that are left, side by side.
        workers: how many go side by side.
    """

    path: str
    points: int
    runs: int
    done: int
    disk: int
    free: int
    seconds_of_one: float | None
    seconds: float | None
    workers: int

    def as_data(self) -> dict[str, Any]:
        """As a table of JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"sweep    {self.path}",
            f"points   {self.points}",
            f"runs     {self.runs}, {self.done} of them done already",
            f"disk     up to {format_bytes(self.disk)}, {format_bytes(self.free)} free",
        ]
        if self.seconds_of_one is None or self.seconds is None:
            lines.append("time     not known: the trial run made no step")
        else:
            lines.append(f"one run  about {duration(self.seconds_of_one)}")
            lines.append(f"time     about {duration(self.seconds)}, {self.workers} at a time")
        return "\n".join(lines)


def estimate(specs: SweepSpecs, *, root: Path | str, name: str | None, means: Means) -> Estimate:
    """What a sweep would take; every point is built once, so that a bad one is found.

    Raises:
        InvalidInput: a point cannot be built.
    """
    root = Path(root)
    found = sweep_of(specs, root, name)
    points = [with_absolute_paths(spec) for _, spec in specs.points]
    device = resolve_device(specs.base.device)
    studies = [point.study for point in found.points]
    facts = facts_of(dict(zip(studies, points, strict=True)), root, device, means)
    runs = disk = steps = left = 0
    for study, spec, known in zip(studies, points, facts, strict=True):
        tasks = tasks_of(spec)
        open_tasks = [task for task in tasks if is_missing(study, spec, task)]
        runs, left = runs + len(tasks), left + len(open_tasks)
        disk += disk_of(spec, open_tasks, known)
        steps += sum(task.most_steps(spec, known.num_samples) for task in open_tasks)
    workers = min(means.workers or default_workers(specs.base.threads, device), max(1, left))
    a_step = _seconds_of_a_step(points[0], facts[0], device, means.plugins) if left else None
    return Estimate(
        str(found.path),
        *(len(points), runs, runs - left, disk, free_bytes(_existing(root))),
        None if a_step is None else a_step * steps / left,
        None if a_step is None else a_step * steps / workers,
        workers,
    )


def _existing(folder: Path) -> Path:
    """The folder, or the first one above it that is there."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())


def _seconds_of_a_step(
    spec: Spec, facts: ProblemFacts, device: str, plugins: Sequence[str]
) -> float | None:
    """Time of a step of the first point's trunk, which follows a subspace as the spec says."""
    spec = with_way_to_multiply(spec, facts.chunk_size, facts.vectorize_up_to)
    with tempfile.TemporaryDirectory() as folder:
        study = StudyFolder.create(folder, "trial", dump_spec(spec))
        task = Task(spec.seeds[0], TRUNK)
        create_runs(study, spec, [task], facts.fingerprint, this_maker(device, plugins), [task])
        run = study.run(task.seed, task.branch)
        arguments = (str(study.path), task.seed, TRUNK, device, spec.threads, plugins)
        child = Child(work, arguments, run.path / "log.txt")
        begun = time.monotonic()
        try:
            while child.is_running and time.monotonic() - begun < TRIAL_SECONDS:
                time.sleep(POLL_SECONDS)
        finally:
            # After Ctrl-C, too: a run that still writes would keep the folder from being removed.
            child.ask_to_stop()
            child.ending()
        status = run.status()
    return status.seconds / status.step if status is not None and status.step else None
