"""A sweep from its axes to its pictures: plan every point, run what is missing, judge, report.

    from thalweg import lab

    result = lab.sweep("digits", grid={"lr": [0.01, 0.03, 0.1]}, seeds=range(3))
    result.data.groupby("lr").loss.last()

A point is a study like any other, in a folder of its own; so a sweep goes on wherever it was ended,
and has the runs that other studies in the same folder have made.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thalweg import registry
from thalweg.errors import Diverged, Interrupted, InUse, InvalidInput, invalid
from thalweg.lab.config import Spec, dump_spec
from thalweg.lab.config.overrides import parse_overrides
from thalweg.lab.differing_settings import folder_label
from thalweg.lab.execution.lockstep import runs_in_lockstep, usual_executor
from thalweg.lab.execution.machine import default_workers, resolve_device
from thalweg.lab.execution.schedule import Executor, Outcome, Task, run_tasks, tasks_of
from thalweg.lab.execution.signs_of_life import HUNG_AFTER
from thalweg.lab.means import Means
from thalweg.lab.preparing import (
    Plan,
    is_missing,
    planned,
    read_spec,
    study_path,
    with_absolute_paths,
)
from thalweg.lab.problem_facts import (
    ProblemFacts,
    examine_all,
    problem_key,
    with_way_to_multiply,
)
from thalweg.lab.progress import Progress
from thalweg.lab.sharing import (
    FinishedRuns,
    KnownRuns,
    known_way_to_multiply,
    this_maker,
    without_diverged,
)
from thalweg.lab.store import StudyFolder, check_disk, load
from thalweg.lab.store.durable import check_name, full_disk_told, make_folder
from thalweg.lab.store.frames import SWEEP_FILE
from thalweg.lab.store.lock import locked
from thalweg.lab.study import check_paths, check_spec
from thalweg.lab.sweeps.axes import Axes, Range
from thalweg.lab.sweeps.folder import (
    find_sweep,
    read_sweep,
    sweep_name,
    united,
    write_sweep,
)
from thalweg.lab.sweeps.points import Point, Setting, Sweep
from thalweg.lab.sweeps.progress import SweepProgress
from thalweg.lab.sweeps.specs import SweepSpecs, sweep_specs
from thalweg.registry import load_plugin

if TYPE_CHECKING:
    import pandas

RETRIES = 2
"""How often a run is begun again by default: among many runs one is killed now and then."""
ELSEWHERE = ("slurm", "ray")
"""Executors whose runs compute on other machines."""
PLAN_SECONDS = 1.0
"""Between two tries to plan a sweep that another process plans."""


@dataclass(frozen=True)
class SweepResult:
    """What a sweep gave.

    Attributes:
        sweep: its folder and points.
        outcome: how the runs of this call ended.
        conclusions: what was made of the measurements, by name; empty after an interruption, and
            where runs were left to a queue.
    """

    sweep: Sweep
    outcome: Outcome
    conclusions: Mapping[str, Any] = field(default_factory=dict)

    @property
    def report(self) -> Path | None:
        """The HTML page; None where none was made."""
        return self.conclusions.get("report")

    @property
    def data(self) -> pandas.DataFrame:
        """All metrics: one row a measured step, with the settings of its point as columns."""
        return load(self.sweep.path)

    @property
    def exit_code(self) -> int:
        """0: done, diverged runs among them, which are an answer; 75: interrupted; else 1, 2 or 4.

        A run that failed gives its own.
        """
        codes = [ending.exit_code for ending in self.outcome.endings.values()]
        worse = [code for code in codes if code not in (0, Diverged.exit_code)]
        return self.outcome.exit_code if 75 in worse or self.outcome.interrupted else [*worse, 0][0]


def sweep(
    source: str | Path,
    *,
    grid: Mapping[str, Sequence[Setting]] | None = None,
    zip: Mapping[str, Sequence[Setting]] | None = None,
    random: Mapping[str, Range | Sequence[Setting]] | None = None,
    draws: int = 10,
    draw_seed: int = 0,
    points: Sequence[Mapping[str, Setting]] = (),
    seeds: Sequence[int] | None = None,
    problem: str | None = None,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    name: str | None = None,
    root: Path | str = "runs",
    workers: int | None = None,
    plugins: Sequence[str] = (),
    executor: str | Executor | None = None,
    progress: Progress | None = None,
    retries: int = RETRIES,
    hung_after: float = HUNG_AFTER,
    executor_options: Mapping[str, object] | None = None,
) -> SweepResult:
    """Run a spec at every point of a grid of settings, then draw the regimes.

    Called again with more values or seeds it extends what is there; nothing is run twice.

    Args:
        source: a TOML file, or the name of a built-in spec or study.
        grid: values of each key, all combined.
        zip: values of each key, side by side.
        random, draws, draw_seed: where values are drawn, how many points, from which seed.
        points: settings of points one by one.
        seeds: of every point; default: the spec's.
        problem: of a study.
        overrides: values by key path, or words of the command line, for all points.
        name: of the sweep's folder; default: made of the spec's name, data and keys.
        root, workers, plugins, executor, progress, retries, hung_after: see `lab.run`.
        executor_options: what is asked of the executor, such as `{"partition": "gpu"}` of "slurm".

    Raises:
        InvalidInput: an axis or a point that cannot be.
        ThalwegError: not enough room on the disk.
    """
    for plugin in plugins:
        load_plugin(plugin)
    listed = [dict(point) for point in points]
    axes = Axes(grid or {}, zip or {}, random or {}, draws, draw_seed, listed)
    given = dict(overrides if isinstance(overrides, Mapping) else parse_overrides(overrides))
    if seeds is not None:
        given["seeds"] = list(seeds)
    specs = sweep_specs(source, axes, problem=problem, overrides=given)
    progress = progress or Progress.silent()
    how = (workers, plugins, executor, progress, retries, hung_after)
    means = Means(*how, executor_options or {})
    return run_sweep(specs, root=root, name=name, means=means)


def run_sweep(
    specs: SweepSpecs, *, root: Path | str, name: str | None, means: Means
) -> SweepResult:
    """Run what is missing of a sweep's specs; see `sweep`."""
    asked = sweep_of(specs, Path(root), name)
    pairs = zip(asked.points, specs.points, strict=True)
    return _run(asked, {point.study: spec for point, (_, spec) in pairs}, means)


def resume_sweep(name: str | Path, *, root: Path | str = "runs", means: Means) -> SweepResult:
    """Go on with a sweep, from what its folder and its studies' say."""
    found = find_sweep(name, root)
    return _run(found, {point.study: read_spec(point.study) for point in found.points}, means)


def sweep_of(specs: SweepSpecs, root: Path, name: str | None = None) -> Sweep:
    """The sweep that these specs are, each point with its folder, made or not."""
    path = root / check_name("name of a sweep", name or sweep_name(specs.base, specs.keys))
    points = [
        Point(settings, StudyFolder(study_path(root, spec, folder_label(settings))))
        for settings, spec in specs.points
    ]
    return Sweep(path, name or path.name, specs.base.seeds, tuple(points))


def conclude(
    found: Sweep,
    changed: Sequence[StudyFolder] | None = None,
    pictures: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Judge the claims of its studies, draw its pictures, write its page.

    Args:
        changed: the studies that are judged anew; default: all. Those without verdicts are in any
            case.
        pictures: what is drawn, as keyword arguments of `analysis.regimes.conclude_sweep`.

    Raises:
        InvalidInput: none of its studies is there.
    """
    if len(missing_studies(found)) == len(found.points):
        root, studies = found.path.parent, "the folders of its studies"
        raise invalid("sweep", str(found.path), f"one with {studies} beside it; none is in {root}")
    made: dict[str, Any] = {}
    with full_disk_told(found.path):
        for study in (point.study for point in found.points):
            if changed is None or study in changed or study.read_verdicts() is None:
                _judge(study)
        for name, conclusion in registry.sweep_conclusions.items():
            made[name] = conclusion(found, **(pictures or {}))
    return made


def missing_studies(found: Sweep) -> list[StudyFolder]:
    """The studies of a sweep that are not there: deleted, or left behind where it was moved."""
    studies = [point.study for point in found.points]
    return [study for study in studies if not study.exists]


def _judge(study: StudyFolder) -> None:
    """Write the verdicts of one study, where anything has been measured."""
    if study.exists and not load(study).empty:
        registry.conclusions["verdicts"](study, read_spec(study), {})


def _run(asked: Sweep, specs: Mapping[StudyFolder, Spec], means: Means) -> SweepResult:
    specs = {study: with_absolute_paths(spec) for study, spec in specs.items()}
    for spec in specs.values():
        check_spec(spec)
        check_paths(spec)
        if spec.holds_objects:
            raise InvalidInput(
                "sweep: the spec holds Python objects, which other processes cannot read; register"
                " them in a --plugin file"
            )
    first = next(iter(specs.values()))
    device = _device(first.device, means.executor)
    with full_disk_told(asked.path):
        make_folder(asked.path)
        with _alone(asked.path, means.progress):
            found, plans = _planned(asked, specs, device, means)
        tasks = [task for plan in plans for task in plan.tasks]
        total = sum(len(tasks_of(spec)) for spec in specs.values())
        outcome = _run_tasks(found, tasks, total, device, first.threads, means)
        if outcome.submitted or outcome.interrupted:
            return SweepResult(found, outcome)
        means.progress.say("judging claims, drawing pictures, writing the report ...")
        return SweepResult(found, outcome, conclude(found, [p.study for p in plans if p.tasks]))


def _device(asked: str, executor: str | Executor | None) -> str:
    """Where the runs compute: on this machine, or on one that has what this one may lack."""
    if executor in ELSEWHERE and asked != "auto":
        return asked
    return resolve_device(asked)


@contextmanager
def _alone(path: Path, progress: Progress) -> Iterator[None]:
    """Plan while nobody else does: a second process waits for the first one."""
    with ExitStack() as held:
        told = False
        while True:
            try:
                held.enter_context(locked(path, "sweep"))
                break
            except InUse as error:
                if not told:
                    progress.say(f"{error}: waiting until its plan is made")
                    told = True
            time.sleep(PLAN_SECONDS)
        # Outside of the try: that a study is in use is no matter of the sweep's lock.
        yield


def _planned(
    asked: Sweep, specs: Mapping[StudyFolder, Spec], device: str, means: Means
) -> tuple[Sweep, list[Plan]]:
    """Every study with its folder and runs; what is left to do of each."""
    progress, root = means.progress, asked.path.parent
    progress.say(f"planning {len(specs)} points ...")
    left = {study: spec for study, spec in specs.items() if not _is_done(study, spec)}
    facts = dict(zip(left, facts_of(left, root, device, means), strict=True))
    known, now = KnownRuns(FinishedRuns(root)), this_maker(device, means.plugins)
    plans: list[Plan] = []
    for study, spec in specs.items():
        found = facts.get(study)
        if found is not None and not study.exists:
            full = with_way_to_multiply(spec, found.chunk_size, found.vectorize_up_to)
            StudyFolder.create(root, study.name, dump_spec(full))
        with locked(study.path, "study"):
            silent = Progress.silent()
            how = (means.plugins, device, silent, found, means.hung_after)
            plan = planned(study, spec, *how, known)
        plans.append(replace(plan, tasks=without_diverged(plan.tasks, now)))
    whole = united(read_sweep(asked.path), asked) if (asked.path / SWEEP_FILE).is_file() else asked
    write_sweep(whole)
    if disk := sum(plan.disk for plan in plans):
        progress.say(check_disk(asked.path, disk))
    return whole, plans


def _is_done(study: StudyFolder, spec: Spec) -> bool:
    """Whether all runs of a spec are done in the study's folder."""
    return not any(is_missing(study, spec, task) for task in tasks_of(spec))


def facts_of(
    specs: Mapping[StudyFolder, Spec], root: Path, device: str, means: Means
) -> list[ProblemFacts]:
    """What is known of each point's problem, the way to multiply that was chosen once included."""
    if not specs:
        return []
    ways: dict[str, tuple[int | None, int | None]] = {}
    for study, spec in specs.items():
        if study.exists:
            known = read_spec(study).problem
            ways[problem_key(spec)] = (known.chunk_size, known.vectorize_up_to)
    for spec in specs.values():
        if problem_key(spec) not in ways:
            ways[problem_key(spec)] = known_way_to_multiply(spec, root) or (None, None)
    given = [with_way_to_multiply(spec, *ways[problem_key(spec)]) for spec in specs.values()]
    inline = means.executor == "inline"
    # A machine that plans for others may lack their device.
    here = device if means.executor not in ELSEWHERE else resolve_device("auto")
    return examine_all(given, means.plugins, here, inline=inline, hung_after=means.hung_after)


def _run_tasks(
    found: Sweep,
    tasks: Sequence[Task],
    total: int,
    device: str,
    threads: int,
    means: Means,
) -> Outcome:
    shown = SweepProgress(means.progress, found, tasks, total)
    if not tasks:
        means.progress.say(f"{found.path}: all {total} runs are done")
        return Outcome()
    workers = min(means.workers or default_workers(threads, device), len(tasks))
    study_of = {task: StudyFolder(task.study or found.path) for task in tasks}
    runs = (study.run(task.seed, task.branch) for task, study in study_of.items())
    executor = means.executor or usual_executor(device, runs)
    shown.begin(workers, means.plugins)
    if executor == "lockstep":
        spec_of = {study.path: read_spec(study) for study in study_of.values()}
        line = runs_in_lockstep(tasks, lambda task: spec_of[study_of[task].path])
        means.progress.say(line)
    try:
        outcome = run_tasks(
            StudyFolder(found.path),
            tasks,
            workers=workers,
            device=device,
            threads=threads,
            plugins=means.plugins,
            watch=shown.show,
            executor=executor,
            say=means.progress.warn,
            retries=means.retries,
            hung_after=means.hung_after,
            options=means.executor_options,
        )
    finally:
        shown.stop()
    shown.end(outcome)
    if outcome.interrupted and not outcome.exit_code:
        raise Interrupted("stopped on request; all runs are done, and the report is left")
    return outcome
