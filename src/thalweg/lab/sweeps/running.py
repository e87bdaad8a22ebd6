"""A sweep from its axes to its pictures: plan every point, run what is missing, judge, report.

    from thalweg import lab

    result = lab.sweep("digits", grid={"lr": [0.01, 0.03, 0.1]}, seeds=range(3))
    result.data.groupby("lr").loss.last()

A point is a study like any other, in a folder of its own; so a sweep goes on wherever it was ended,
and has the runs that other studies in the same folder have made.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thalweg import registry
from thalweg.errors import (
    Diverged,
    IntegrityError,
    Interrupted,
    InUse,
    InvalidInput,
    ThalwegError,
    invalid,
)
from thalweg.lab.config import Spec, dump_spec
from thalweg.lab.config.overrides import parse_overrides
from thalweg.lab.differing_settings import folder_label
from thalweg.lab.execution.launched import refuse_sharing
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
from thalweg.lab.store.lock import is_locked, locked
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


Troubles = Mapping[StudyFolder, ThalwegError]
"""What keeps studies from being planned or judged."""


@dataclass(frozen=True)
class SweepResult:
    """What a sweep gave.

    Attributes:
        sweep: its folder and points.
        outcome: how the runs of this call ended.
        conclusions: what was made of the measurements, by name; empty after an interruption, and
            where runs were left to a queue.
        left_out: studies that could not be gone on with, since something of them is damaged, and
            why.
    """

    sweep: Sweep
    outcome: Outcome
    conclusions: Mapping[str, Any] = field(default_factory=dict)
    left_out: Troubles = field(default_factory=dict)

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

        A run that failed gives its own, a damaged study 4.
        """
        codes = [ending.exit_code for ending in self.outcome.endings.values()]
        codes += [error.exit_code for error in self.left_out.values()]
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
    """Go on with a sweep, from what its folder and its studies' say.

    Raises:
        ThalwegError: none of its studies can be read.
    """
    found = find_sweep(name, root)
    specs: dict[StudyFolder, Spec] = {}
    unread: dict[StudyFolder, ThalwegError] = {}
    for study in (point.study for point in found.points):
        try:
            specs[study] = read_spec(study)
        except (IntegrityError, InvalidInput) as error:
            unread[study] = error
    return _run(found, specs, means, unread)


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
    pictures: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Draw its pictures, write its page; what `judge` found is on it.

    Args:
        pictures: what is drawn, as keyword arguments of `analysis.regimes.conclude_sweep`.

    Raises:
        InvalidInput: none of its studies is there.
    """
    if len(missing_studies(found)) == len(found.points):
        root, studies = found.path.parent, "the folders of its studies"
        raise invalid("sweep", str(found.path), f"one with {studies} beside it; none is in {root}")
    made: dict[str, Any] = {}
    with full_disk_told(found.path):
        for name, conclusion in registry.sweep_conclusions.items():
            made[name] = conclusion(found, **(pictures or {}))
    return made


def judge(
    found: Sweep, changed: Collection[StudyFolder] | None = None
) -> dict[StudyFolder, ThalwegError]:
    """Judge the claims of its studies; returns why it cannot be done for some.

    Args:
        changed: the studies that are judged anew; default: all. Those without verdicts are in any
            case.
    """
    troubles: dict[StudyFolder, ThalwegError] = {}
    for study in (point.study for point in found.points):
        try:
            with full_disk_told(found.path):
                if changed is None or study in changed or study.read_verdicts() is None:
                    _judge(study)
        except (IntegrityError, InvalidInput) as error:
            troubles[study] = error
    return troubles


def in_words(study: StudyFolder, trouble: ThalwegError) -> str:
    """One line on a study that is left out: why, and what to do."""
    said = " ".join(str(trouble).split())
    if not study.exists:
        hint = "; the command that the sweep was begun with makes it anew"
    elif "thalweg check" in said:
        hint = ""
    else:
        hint = f"; to mend it: thalweg check {study.path} --repair; or move it away"
    return f"{study.name}: left out: {said}{hint}"


def missing_studies(found: Sweep) -> list[StudyFolder]:
    """The studies of a sweep that are not there: deleted, or left behind where it was moved."""
    studies = [point.study for point in found.points]
    return [study for study in studies if not study.exists]


def _judge(study: StudyFolder) -> None:
    """Write the verdicts of one study, where anything has been measured."""
    if study.exists and not load(study).empty:
        registry.conclusions["verdicts"](study, read_spec(study), {})


def _run(
    asked: Sweep, specs: Mapping[StudyFolder, Spec], means: Means, unread: Troubles | None = None
) -> SweepResult:
    """Run what is missing, those studies last that another process is at work on.

    Args:
        unread: studies whose spec cannot be read.
    """
    troubles = dict(unread or {})
    if not specs:
        raise next(iter(troubles.values()))
    specs = checked(specs)
    first = next(iter(specs.values()))
    device = device_of_runs(first.device, means.executor)
    outcome, left = Outcome(), specs
    changed: list[StudyFolder] = []
    _tell(troubles, means.progress)
    with full_disk_told(asked.path):
        make_folder(asked.path)
        while True:
            with _alone(asked.path, means.progress):
                plan = _planned(asked, left, device, means)
            troubles |= plan.troubles
            if len(troubles) == len(asked.points):
                raise next(iter(troubles.values()))
            _tell(plan.troubles, means.progress)
            outcome = _joined(outcome, _run_tasks(plan, left, device, first.threads, means))
            changed += plan.changed
            left = {study: specs[study] for study in plan.in_use}
            if outcome.submitted or outcome.interrupted or not left:
                break
            _wait_for_one(left)
        if outcome.submitted and left:
            later = "the same command does it once that has ended"
            means.progress.warn(f"{len(left)} studies in use are not submitted: {later}")
        if outcome.submitted or outcome.interrupted:
            return SweepResult(plan.sweep, outcome, left_out=troubles)
        return _concluded(SweepResult(plan.sweep, outcome, left_out=troubles), changed, means)


def _concluded(result: SweepResult, changed: Sequence[StudyFolder], means: Means) -> SweepResult:
    """The result with what is made of the measurements, where the runs have ended."""
    found, progress = result.sweep, means.progress
    progress.say("judging claims, drawing pictures, writing the report ...")
    unjudged = judge(found, changed)
    _tell({s: e for s, e in unjudged.items() if s not in result.left_out}, progress)
    left_out = {**unjudged, **result.left_out}
    if left_out:
        progress.warn(f"{len(left_out)} of {len(found.points)} studies left out, as said above")
    return replace(result, conclusions=conclude(found), left_out=left_out)


def checked(specs: Mapping[StudyFolder, Spec]) -> dict[StudyFolder, Spec]:
    """The specs with absolute paths, each of which can be run in a sweep.

    Raises:
        InvalidInput: one cannot.
    """
    specs = {study: with_absolute_paths(spec) for study, spec in specs.items()}
    for spec in specs.values():
        refuse_sharing(spec, "sweep")
        check_spec(spec)
        check_paths(spec)
        if spec.holds_objects:
            raise InvalidInput(
                "sweep: the spec holds Python objects, which other processes cannot read; register"
                " them in a --plugin file"
            )
    return dict(specs)


def _joined(first: Outcome, second: Outcome) -> Outcome:
    """The outcome of two rounds, none of which was interrupted before its end but the second."""
    endings = {**first.endings, **second.endings}
    left_out = [*first.left_out, *second.left_out]
    return Outcome(endings, left_out, second.interrupted, second.submitted)


def _tell(troubles: Troubles, progress: Progress) -> None:
    for study, trouble in troubles.items():
        progress.warn(in_words(study, trouble))


def _wait_for_one(studies: Collection[StudyFolder]) -> None:
    """Wait until another process has ended its work on one of the studies, if there are any."""
    while studies and all(is_locked(study.path) for study in studies):
        time.sleep(PLAN_SECONDS)


def device_of_runs(asked: str, executor: str | Executor | None) -> str:
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


@dataclass(frozen=True)
class SweepPlan:
    """What is to be done of a sweep, as far as that can be said now.

    Attributes:
        sweep: with all points that it has had.
        plans: of its studies.
        in_use: studies that another process is at work on; they are planned once that has ended.
        troubles: studies that cannot be planned, and why.
    """

    sweep: Sweep
    plans: Sequence[Plan]
    in_use: Sequence[StudyFolder]
    troubles: Troubles

    @property
    def tasks(self) -> list[Task]:
        """The runs that are left to do."""
        return [task for plan in self.plans for task in plan.tasks]

    @property
    def changed(self) -> list[StudyFolder]:
        """The studies whose verdicts may be others afterwards."""
        return [*(plan.study for plan in self.plans if plan.tasks), *self.in_use]


def _planned(
    asked: Sweep, specs: Mapping[StudyFolder, Spec], device: str, means: Means
) -> SweepPlan:
    """Every study with its folder and runs; what is left to do of each."""
    progress, root = means.progress, asked.path.parent
    progress.say(f"planning {len(specs)} points ...")
    # One whose spec.toml was set aside as damaged needs it anew, whatever its runs say.
    left = {s: spec for s, spec in specs.items() if not (s.exists and _is_done(s, spec))}
    facts = dict(zip(left, facts_of(left, root, device, means), strict=True))
    known, now = KnownRuns(FinishedRuns(root)), this_maker(device, means.plugins)
    plans: list[Plan] = []
    in_use: list[StudyFolder] = []
    troubles: dict[StudyFolder, ThalwegError] = {}
    for study, spec in specs.items():
        found = facts.get(study)
        if found is not None and not study.exists:
            full = with_way_to_multiply(spec, found.chunk_size, found.vectorize_up_to)
            StudyFolder.create(root, study.name, dump_spec(full))
        how = (means.plugins, device, Progress.silent(), found, means.hung_after)
        try:
            with locked(study.path, "study"):
                plan = planned(study, spec, *how, known)
                plans.append(replace(plan, tasks=without_diverged(plan.tasks, now)))
        except InUse as error:
            in_use.append(study)
            progress.say(f"{error}: its runs come last")
        except (IntegrityError, InvalidInput) as error:
            troubles[study] = error
    whole = united(read_sweep(asked.path), asked) if (asked.path / SWEEP_FILE).is_file() else asked
    write_sweep(whole)
    if disk := sum(plan.disk for plan in plans):
        progress.say(check_disk(asked.path, disk))
    return SweepPlan(whole, plans, in_use, troubles)


def _is_done(study: StudyFolder, spec: Spec) -> bool:
    """Whether all runs of a spec are done in the study's folder; not, where one is damaged."""
    try:
        return not any(is_missing(study, spec, task) for task in tasks_of(spec))
    except IntegrityError:
        return False


def facts_of(
    specs: Mapping[StudyFolder, Spec], root: Path, device: str, means: Means
) -> list[ProblemFacts]:
    """What is known of each point's problem, the way to multiply that was chosen once included."""
    if not specs:
        return []
    ways: dict[str, tuple[int | None, int | None]] = {}
    for study, spec in specs.items():
        if study.exists:
            with suppress(IntegrityError, InvalidInput):  # told by whoever plans it
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
    plan: SweepPlan, specs: Mapping[StudyFolder, Spec], device: str, threads: int, means: Means
) -> Outcome:
    """Have the runs of a plan run, and say how it goes."""
    found, tasks = plan.sweep, plan.tasks
    total = sum(len(tasks_of(specs[one.study])) for one in plan.plans)
    shown = SweepProgress(means.progress, found, tasks, total)
    if not tasks:
        if not plan.in_use:
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
