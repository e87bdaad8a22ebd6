"""The commands that do something: reproduce, run, resume, report, end-phase."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from thalweg.cli.output import out, out_json
from thalweg.errors import InvalidInput

if TYPE_CHECKING:
    from thalweg.lab.progress import Progress
    from thalweg.lab.spec import Spec
    from thalweg.lab.study import StudyResult


def reproduce(options: argparse.Namespace) -> int:
    """Run a study of the paper."""
    from thalweg.lab.study import reproduction_spec

    load_plugins(options)
    place = None if options.data_dir is None else str(Path(options.data_dir).expanduser())
    spec = reproduction_spec(
        options.study, options.problem, data_dir=place, overrides=options.overrides
    )
    return _execute(spec, options)


def run(options: argparse.Namespace) -> int:
    """Run a spec."""
    from thalweg.lab.spec import load_spec

    load_plugins(options)
    return _execute(load_spec(options.spec, options.overrides), options)


def resume(options: argparse.Namespace) -> int:
    """Go on with a study."""
    from thalweg.lab.study import resume as resume_study

    _check_workers(options)
    load_plugins(options)
    result = resume_study(
        options.study,
        root=options.root,
        workers=options.workers,
        plugins=options.plugin,
        progress=_progress(options),
    )
    return _conclude(result, as_json=options.json)


def report(options: argparse.Namespace) -> int:
    """Judge, draw and write the report anew."""
    from thalweg.lab.preparing import read_spec
    from thalweg.lab.store import open_study
    from thalweg.lab.study import conclude

    load_plugins(options)
    study = open_study(options.study, options.root)
    return _conclude(conclude(study, read_spec(study)), as_json=options.json)


def end_phase(options: argparse.Namespace) -> int:
    """End the current phase of a running run by hand."""
    from thalweg.lab.phase_request import ask_to_end

    ask_to_end(options.run, options.root)
    return 0


def load_plugins(options: argparse.Namespace) -> None:
    """Import the user's modules; what they print is not a result."""
    from thalweg.lab.registry import load_plugin

    with contextlib.redirect_stdout(sys.stderr):
        for plugin in options.plugin:
            load_plugin(plugin)


def _execute(spec: Spec, options: argparse.Namespace) -> int:
    from thalweg.lab.spec import dump_spec
    from thalweg.lab.study import check_spec, run_study

    _check_workers(options)
    if options.dry_run:
        check_spec(spec)
        out(dump_spec(spec), end="")
        return 0
    result = run_study(
        spec,
        root=options.root,
        workers=options.workers,
        plugins=options.plugin,
        progress=_progress(options),
    )
    return _conclude(result, as_json=options.json)


def _conclude(result: StudyResult, *, as_json: bool) -> int:
    if as_json:
        out_json(
            {
                "study": str(result.study.path),
                "report": None if result.report is None else str(result.report),
                "verdicts": [] if result.report is None else result.study.read_verdicts(),
                "exit_code": result.exit_code,
            }
        )
        return result.exit_code
    if result.verdicts:
        from rich.console import Console

        from thalweg.lab.claims.verdicts import render_verdicts

        Console().print(render_verdicts(result.verdicts))
    if result.report is not None:
        out(f"figures  {result.study.path / 'figures'}")
        out(f"report   {result.report}")
    return result.exit_code


def _check_workers(options: argparse.Namespace) -> None:
    if options.workers is not None and options.workers < 1:
        raise InvalidInput(f"--workers: got {options.workers}, allowed: an integer >= 1")


def _progress(options: argparse.Namespace) -> Progress:
    from thalweg.lab.progress import Progress

    return Progress.to_stderr(quiet=options.quiet)
