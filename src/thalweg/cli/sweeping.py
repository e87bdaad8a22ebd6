"""The commands on many studies at once: sweep, and work for those that share its runs."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from thalweg.cli.output import err, out, out_json
from thalweg.cli.studying import data_dir_words, load_plugins, override_words, progress_of
from thalweg.errors import InvalidInput

if TYPE_CHECKING:
    from thalweg.lab.execution.schedule import Outcome
    from thalweg.lab.execution.slurm_queue import Element
    from thalweg.lab.means import Means
    from thalweg.lab.sweeps.points import Point, Sweep
    from thalweg.lab.sweeps.running import SweepResult
    from thalweg.lab.sweeps.search import SearchResult
    from thalweg.lab.sweeps.specs import SweepSpecs

ACTIONS = ("status", "cancel", "collect")
UNFINISHED = ("waiting", "running", "interrupted")


def sweep(options: argparse.Namespace) -> int:
    """Run a grid of studies, or look after one."""
    load_plugins(options)
    first, *rest = options.words
    if first in ACTIONS:
        if len(rest) != 1:
            raise InvalidInput(f"thalweg sweep {first}: give one sweep: its folder or its name")
        return {"status": _status, "cancel": _cancel, "collect": _collect}[first](rest[0], options)
    if rest:
        raise InvalidInput(f"sweep: got {' '.join(options.words)!r}, allowed: one spec")
    return _run(first, options)


def work(options: argparse.Namespace) -> int:
    """Do runs of a study or sweep that nobody is at work on."""
    from thalweg.lab.working import work as do_work

    load_plugins(options)
    outcome = do_work(
        options.name,
        root=options.root,
        seeds=options.seed,
        workers=options.workers or 1,
        plugins=options.plugin,
        executor=options.executor,
        progress=progress_of(options),
        retries=options.retries,
        hung_after=options.hung_after,
    )
    _tell_failures(outcome)
    return outcome.exit_code


def resume(options: argparse.Namespace) -> int:
    """Go on with a sweep."""
    from thalweg.lab.sweeps.running import resume_sweep

    return _end(resume_sweep(options.study, root=options.root, means=_means(options)), options)


def report(options: argparse.Namespace) -> int:
    """Judge every study of a sweep anew, and write its report."""
    given = {"axes": options.axes, "statistic": options.statistic, "branch": options.branch}
    return _collect(options.study, options, given)


def _run(source: str, options: argparse.Namespace) -> int:
    from thalweg.lab.sweeps.axes import axes_from_words
    from thalweg.lab.sweeps.running import run_sweep
    from thalweg.lab.sweeps.specs import sweep_specs

    if options.search is not None:
        return _search(source, options)
    for word in ("minimize", "maximize", "of"):
        if getattr(options, word) is not None:
            raise InvalidInput(f"--{word}: nothing is searched; say how long: --search TRIALS")
    axes = axes_from_words(
        options.grid, options.zip, options.random, options.draws, options.draw_seed
    )
    specs = sweep_specs(source, axes, problem=options.problem, overrides=_overrides(options))
    if options.dry_run:
        return _dry_run(specs, options)
    how = {"root": options.root, "name": options.name}
    return _end(run_sweep(specs, **how, means=_means(options)), options)


def _search(source: str, options: argparse.Namespace) -> int:
    """Let Optuna choose the points of `--random`."""
    from thalweg.lab.sweeps.axes import axes_from_words
    from thalweg.lab.sweeps.search import search

    if options.grid or options.zip or options.draws is not None or options.dry_run:
        raise InvalidInput("--search: allowed with --random KEY=RANGE alone, and no --dry-run")
    axes = axes_from_words(drawn=options.random, draws=options.search if options.random else None)
    means = _means(options)
    found = search(
        source,
        axes.random,
        trials=options.search,
        minimize=options.minimize,
        maximize=options.maximize,
        branch=options.of,
        draw_seed=options.draw_seed,
        problem=options.problem,
        overrides=_overrides(options),
        name=options.name,
        root=options.root,
        **vars(means),
    )
    left = found.outcome.interrupted or found.outcome.submitted
    if not (options.json or left):
        for trial in found.trials:
            out(f"{trial.value:.6g}  {_in_words(trial.point)}")
        out(f"best     {found.best.value:.6g}  {_in_words(found.best.point)}")
    return _end(found, options)


def _overrides(options: argparse.Namespace) -> list[str]:
    return [*override_words(options), *data_dir_words(options)]


def _in_words(point: Point) -> str:
    return ", ".join(f"{key} = {value}" for key, value in point.settings.items())


def _dry_run(specs: SweepSpecs, options: argparse.Namespace) -> int:
    """Say what would be run, without a folder being made."""
    from thalweg.lab.sweeps.estimate import estimate

    found = estimate(specs, root=options.root, name=options.name, means=_means(options))
    if options.json:
        out_json(found.as_data())
    else:
        out(str(found))
    return 0


def _means(options: argparse.Namespace) -> Means:
    from thalweg.lab.means import Means

    return Means(
        workers=options.workers,
        plugins=options.plugin,
        executor=options.executor,
        progress=progress_of(options),
        retries=options.retries,
        hung_after=options.hung_after,
        executor_options=dict(getattr(options, "executor_option", ())),
    )


def _end(result: SweepResult | SearchResult, options: argparse.Namespace) -> int:
    from thalweg.lab.config.smoke_run import WARNING
    from thalweg.lab.sweeps.folder import is_smoke

    data = {
        "sweep": str(result.sweep.path),
        "report": None if result.report is None else str(result.report),
        "submitted": result.outcome.submitted or None,
        "exit_code": result.exit_code,
    }
    if is_smoke(result.sweep):
        err(f"thalweg: {WARNING}")
    if options.json:
        out_json(data)
    elif result.report is not None:
        out(f"report   {result.report}")
    return result.exit_code


def _collect(
    name: str, options: argparse.Namespace, pictures: Mapping[str, Any] | None = None
) -> int:
    from thalweg.lab.sweeps.folder import find_sweep
    from thalweg.lab.sweeps.running import conclude, in_words, judge

    found = find_sweep(name, options.root)
    _tell_missing(found)
    states = _states(found.points)
    if missing := sum(states[state] for state in UNFINISHED):
        err(f"thalweg: {missing} of {states.total()} runs are not done yet")
    left_out = judge(found)
    for study, trouble in left_out.items():
        err(f"thalweg: {in_words(study, trouble)}")
    page = conclude(found, pictures=pictures)["report"]
    if options.json:
        out_json({"sweep": str(found.path), "report": str(page), "states": dict(states)})
    else:
        out(f"report   {page}")
    return next((trouble.exit_code for trouble in left_out.values()), 0)


def _status(name: str, options: argparse.Namespace) -> int:
    from thalweg.lab.execution.slurm_queue import SUBMISSIONS, knows_slurm, status
    from thalweg.lab.sweeps.folder import find_sweep

    found = find_sweep(name, options.root)
    if (found.path / SUBMISSIONS).is_dir() and not knows_slurm():
        err("thalweg: no squeue on this machine's PATH: what is in Slurm's queue is not known here")
    _tell_missing(found)
    points = [_point_row(point) for point in found.points]
    queued = [_element_row(element) for element in status(found.path) if element.is_queued]
    if options.json:
        out_json({"sweep": str(found.path), "points": points, "queued": queued})
        return 0
    for row in points:
        states = ", ".join(f"{count} {state}" for state, count in row["states"].items())
        out(f"{row['in_words']}: {states}")
    total = _states(found.points)
    out("all: " + ", ".join(f"{count} {state}" for state, count in total.items()))
    for row in queued:
        out(f"Slurm {row['number']}: {row['queue']}: {row['study']} seed {row['seed']}")
    return 0


def _cancel(name: str, options: argparse.Namespace) -> int:
    from thalweg.lab.execution.slurm_queue import SUBMISSIONS, cancel
    from thalweg.lab.sweeps.folder import find_sweep

    found = find_sweep(name, options.root)
    if not (found.path / SUBMISSIONS).is_dir():
        raise InvalidInput(
            f"{found.path}: nothing of it was left to a queue; Ctrl-C ends a sweep that a command"
            " runs itself"
        )
    cancelled = [_element_row(element) for element in cancel(found.path)]
    if options.json:
        out_json({"sweep": str(found.path), "cancelled": cancelled})
    else:
        out(f"{len(cancelled)} elements are taken out of Slurm's queue")
    return 0


def _element_row(element: Element) -> dict[str, Any]:
    return {
        "number": element.number,
        "queue": element.queue,
        "study": element.study.name,
        "seed": element.seed,
    }


def _point_row(point: Point) -> dict[str, Any]:
    return {
        "settings": dict(point.settings),
        "in_words": _in_words(point),
        "study": point.study.name,
        "states": dict(_states([point])),
    }


def _states(points: Sequence[Point]) -> Counter[str]:
    """How many runs are in each state."""
    return Counter(run.state() for point in points for run in point.study.runs())


def _tell_missing(found: Sweep) -> None:
    """Say which studies are not there: they count in no state."""
    from thalweg.lab.sweeps.running import missing_studies

    if missing := missing_studies(found):
        count, root = f"{len(missing)} of {len(found.points)}", found.path.parent
        err(f"thalweg: {count} studies of {found.path} are not in {root}: {missing[0].name}, ...")


def _tell_failures(outcome: Outcome) -> None:
    for task, ending in outcome.endings.items():
        if ending.exit_code:
            err(f"thalweg: {task}: {' '.join(ending.message.split())}")
