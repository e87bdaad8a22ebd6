"""What would a sweep take? Runs, steps and disk, before anything is begun.

The time of a step is that of a trial: the first run of the first point, for some seconds, in a
folder that is thrown away. Branches and other points may take another, so that no time of the whole
is made of it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from thalweg.lab.config import TRUNK, Spec, dump_spec
from thalweg.lab.execution.machine import default_workers
from thalweg.lab.execution.processes import POLL_SECONDS, Child
from thalweg.lab.execution.schedule import Task, tasks_of
from thalweg.lab.execution.worker import work
from thalweg.lab.identity import run_hash
from thalweg.lab.means import Means
from thalweg.lab.preparing import create_runs, disk_of, is_missing
from thalweg.lab.problem_facts import ProblemFacts, with_way_to_multiply
from thalweg.lab.sharing import this_maker
from thalweg.lab.store import StudyFolder
from thalweg.lab.store.durable import format_bytes, free_bytes
from thalweg.lab.sweeps.running import ELSEWHERE, checked, device_of_runs, facts_of, sweep_of
from thalweg.lab.sweeps.specs import SweepSpecs

TRIAL_SECONDS = 10.0


@dataclass(frozen=True)
class Estimate:
    """What a sweep would take.

    Attributes:
        path: its folder.
        points, runs, done: how many there are, and how many of the runs are done already.
        disk, free: bytes that would be written at the most, and that are free.
        steps: how many are left at the most; those that points share are made once.
        seconds_of_a_step: of the first point's trunk; None where that was not tried, or made none.
        workers: how many runs go side by side; None where a queue decides that.
    """

    path: str
    points: int
    runs: int
    done: int
    disk: int
    free: int
    steps: int
    seconds_of_a_step: float | None
    workers: int | None

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
        if self.steps:
            at_a_time = "" if self.workers is None else f", {self.workers} runs at a time"
            lines.append(f"steps    up to {self.steps:,}{at_a_time}")
        if self.seconds_of_a_step is not None:
            lines.append(
                f"a step   {1000 * self.seconds_of_a_step:.3g} ms, tried in the first point's trunk"
            )
        return "\n".join(lines)


def estimate(specs: SweepSpecs, *, root: Path | str, name: str | None, means: Means) -> Estimate:
    """What a sweep would take; every point is built once, so that a bad one is found.

    Raises:
        InvalidInput: a point cannot be built, or not be run in a sweep.
    """
    root = Path(root)
    found = sweep_of(specs, root, name)
    pairs = zip(found.points, specs.points, strict=True)
    points = checked({point.study: spec for point, (_, spec) in pairs})
    device = device_of_runs(specs.base.device, means.executor)
    facts = facts_of(points, root, device, means)
    runs = disk = left = 0
    steps: dict[str, int] = {}
    for (study, spec), known in zip(points.items(), facts, strict=True):
        tasks = tasks_of(spec)
        open_tasks = [task for task in tasks if is_missing(study, spec, task)]
        runs, left = runs + len(tasks), left + len(open_tasks)
        disk += disk_of(spec, open_tasks, known)
        for task in open_tasks:
            same = run_hash(spec, task.seed, task.branch, known.fingerprint)
            steps[same] = max(steps.get(same, 0), task.most_steps(spec, known.num_samples))
    counts = (len(points), runs, runs - left, disk, free_bytes(_existing(root)))
    whole = Estimate(str(found.path), *counts, sum(steps.values()), None, None)
    if means.executor in ELSEWHERE or not left:
        return whole
    workers = min(means.workers or default_workers(specs.base.threads, device), left)
    first = next(iter(points.values()))
    a_step = _seconds_of_a_step(first, facts[0], device, means.plugins)
    return replace(whole, seconds_of_a_step=a_step, workers=workers)


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
