"""The commands on many studies at once: sweep, and work for those that share its runs."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from thalweg.cli.output import err, out, out_json
from thalweg.cli.studying import data_dir_words, load_plugins, override_words, progress_of
from thalweg.errors import InvalidInput, ThalwegError

if TYPE_CHECKING:
    from thalweg.lab.execution.schedule import Outcome
    from thalweg.lab.sweeps.points import Point
    from thalweg.lab.sweeps.running import Means, SweepResult
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

    axes = axes_from_words(
        options.grid, options.zip, options.random, options.draws, options.draw_seed
    )
    overrides = [*override_words(options), *data_dir_words(options)]
    specs = sweep_specs(source, axes, problem=options.problem, overrides=overrides)
    if options.dry_run:
        return _dry_run(specs, options)
    return _end(
        run_sweep(specs, root=options.root, name=options.name, means=_means(options)), options
    )


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
    from thalweg.lab.sweeps.running import Means

    return Means(
        workers=options.workers,
        plugins=options.plugin,
        executor=options.executor,
        progress=progress_of(options),
        retries=options.retries,
        hung_after=options.hung_after,
        executor_options=dict(getattr(options, "executor_option", ())),
    )


def _end(result: SweepResult, options: argparse.Namespace) -> int:
    data = {
        "sweep": str(result.sweep.path),
        "report": None if result.report is None else str(result.report),
        "submitted": result.outcome.submitted or None,
        "exit_code": result.exit_code,
    }
    if options.json:
        out_json(data)
    elif result.report is not None:
        out(f"report   {result.report}")
    return result.exit_code


def _collect(
    name: str, options: argparse.Namespace, pictures: Mapping[str, Any] | None = None
) -> int:
    from thalweg.lab.sweeps.folder import find_sweep
    from thalweg.lab.sweeps.running import conclude

    found = find_sweep(name, options.root)
    states = _states(found.points)
    if missing := sum(states[state] for state in UNFINISHED):
        err(f"thalweg: {missing} of {states.total()} runs are not done yet")
    page = conclude(found, pictures=pictures)["report"]
    if options.json:
        out_json({"sweep": str(found.path), "report": str(page), "states": dict(states)})
    else:
        out(f"report   {page}")
    return 0


def _status(name: str, options: argparse.Namespace) -> int:
    from thalweg.lab.sweeps.folder import find_sweep

    found = find_sweep(name, options.root)
    points = [_point_row(point) for point in found.points]
    if options.json:
        out_json({"sweep": str(found.path), "points": points})
        return 0
    for row in points:
        settings = ", ".join(f"{key} = {value}" for key, value in row["settings"].items())
        states = ", ".join(f"{count} {state}" for state, count in row["states"].items())
        out(f"{settings}: {states}")
    total = _states(found.points)
    out("all: " + ", ".join(f"{count} {state}" for state, count in total.items()))
    return 0


def _cancel(name: str, options: argparse.Namespace) -> int:
    from thalweg.lab.sweeps.folder import find_sweep

    found = find_sweep(name, options.root)
    raise InvalidInput(
        f"{found.path}: nothing of it was left to a queue; Ctrl-C ends a sweep on this machine"
    )


def _point_row(point: Point) -> dict[str, Any]:
    return {
        "settings": dict(point.settings),
        "study": point.study.name,
        "states": dict(_states([point])),
    }


def _states(points: Sequence[Point]) -> Counter[str]:
    """How many runs are in each state."""
    found: Counter[str] = Counter()
    for point in points:
        for run in point.study.runs():
            try:
                status = run.status()
                found["waiting" if status is None else status.state] += 1
            except (ThalwegError, OSError):
                found["damaged"] += 1
    return found


def _tell_failures(outcome: Outcome) -> None:
    for task, ending in outcome.endings.items():
        if ending.exit_code:
            err(f"thalweg: {task}: {' '.join(ending.message.split())}")
