"""The commands that do something: reproduce, run, resume, report, stop-phase."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thalweg.cli.output import err, out, out_json
from thalweg.errors import InvalidInput

if TYPE_CHECKING:
    from thalweg.analysis.claims import Verdict
    from thalweg.lab.config import Spec
    from thalweg.lab.progress import Progress
    from thalweg.lab.study import StudyResult


def reproduce(options: argparse.Namespace) -> int:
    """Run a study of the paper, or all of them."""
    from thalweg.lab.config.studies import MAIN
    from thalweg.lab.study import reproduction_spec

    load_plugins(options)
    if options.all or options.extensions:
        return _reproduce_all(options)
    spec = reproduction_spec(
        options.study or MAIN,
        options.problem,
        data_dir=_data_dir(options),
        overrides=override_words(options),
    )
    return _execute(spec, options)


def data_dir_words(options: argparse.Namespace) -> list[str]:
    """The option `--data-dir` as words of the command line."""
    found = _data_dir(options)
    return [] if found is None else ["--data-dir", found]


def _data_dir(options: argparse.Namespace) -> str | None:
    return None if options.data_dir is None else str(Path(options.data_dir).expanduser())


def override_words(options: argparse.Namespace) -> list[str]:
    """The words that set values of the spec; `--smoke` is one."""
    return [*options.overrides, *(["--smoke"] if options.smoke else [])]


def _reproduce_all(options: argparse.Namespace) -> int:
    """Every study in turn, each with its own summary, then the page on all of them."""
    from thalweg.analysis.all_studies import conclude_all, reproductions
    from thalweg.lab.config import dump_spec
    from thalweg.lab.config.smoke_run import WARNING
    from thalweg.lab.execution.launched import launched
    from thalweg.lab.study import check_paths, check_spec

    if options.study is not None or (options.all and options.extensions):
        raise InvalidInput("give one of: a study's name, --all, --extensions")
    if launched() is not None:
        raise InvalidInput(
            "several processes share the runs of one study; give its name, not --all"
        )
    specs = reproductions(
        options.problem,
        data_dir=_data_dir(options),
        overrides=override_words(options),
        extensions=options.extensions,
    )
    # All before the first begins: the last may be hours away.
    for spec in specs:
        check_spec(spec)
        check_paths(spec)
    if options.dry_run:
        for spec in specs:
            out(f"# study {spec.name}\n{dump_spec(spec)}")
        return 0
    progress = progress_of(options, command=options.command)
    results: list[StudyResult] = []
    for number, spec in enumerate(specs, start=1):
        progress.say(f"\nstudy {number} of {len(specs)}: {spec.name}: {spec.description}")
        results.append(_run_study(spec, options, progress))
        if results[-1].outcome.interrupted:
            return results[-1].exit_code
    page = conclude_all(results, options.root, extensions=options.extensions)
    if options.smoke:
        err(f"thalweg: {WARNING}")
    if options.json:
        out_json({"report": str(page), "studies": [_as_data(result) for result in results]})
    else:
        _print_verdicts([verdict for result in results for verdict in result.verdicts])
        out(f"report   {page}")
    codes = [result.exit_code for result in results if result.exit_code]
    return 75 if 75 in codes else next(iter(codes), 0)


def run(options: argparse.Namespace) -> int:
    """Run a spec."""
    from thalweg.lab.config import load_spec

    load_plugins(options)
    return _execute(load_spec(options.spec, override_words(options)), options)


def resume(options: argparse.Namespace) -> int:
    """Continue a study, or a sweep."""
    from thalweg.lab.study import resume as resume_study
    from thalweg.lab.sweeps.folder import is_sweep

    load_plugins(options)
    if is_sweep(options.study, options.root):
        from thalweg.cli import sweeping

        return sweeping.resume(options)
    result = resume_study(
        options.study,
        root=options.root,
        workers=options.workers,
        plugins=options.plugin,
        executor=options.executor,
        progress=progress_of(options),
        retries=options.retries,
        hung_after=options.hung_after,
    )
    return _conclude(result, as_json=options.json)


def report(options: argparse.Namespace) -> int:
    """Judge, draw and write the report anew."""
    from thalweg.lab.preparing import read_spec
    from thalweg.lab.store import open_study
    from thalweg.lab.study import conclude
    from thalweg.lab.sweeps.folder import is_sweep
    from thalweg.lab.unregistered import require_registered

    load_plugins(options)
    if is_sweep(options.study, options.root):
        from thalweg.cli import sweeping

        return sweeping.report(options)
    study = open_study(options.study, options.root)
    require_registered(study)
    return _conclude(conclude(study, read_spec(study)), as_json=options.json)


def stop_phase(options: argparse.Namespace) -> int:
    """End the current phase of a running run by hand."""
    from thalweg.lab.inspection import ask_to_end_phase

    ask_to_end_phase(options.run, options.root)
    return 0


def load_plugins(options: argparse.Namespace) -> None:
    """Import the user's modules; what they print is not a result."""
    from thalweg.registry import load_plugin

    with contextlib.redirect_stdout(sys.stderr):
        for plugin in options.plugin:
            load_plugin(plugin)


def _execute(spec: Spec, options: argparse.Namespace) -> int:
    from thalweg.lab.config import dump_spec
    from thalweg.lab.study import check_paths, check_spec

    if options.dry_run:
        check_spec(spec)
        check_paths(spec)
        out(dump_spec(spec), end="")
        return 0
    return _conclude(_run_study(spec, options, progress_of(options)), as_json=options.json)


def _run_study(spec: Spec, options: argparse.Namespace, progress: Progress) -> StudyResult:
    from thalweg.lab.study import run as run_spec

    return run_spec(
        spec,
        root=options.root,
        workers=options.workers,
        plugins=options.plugin,
        executor=options.executor,
        progress=progress,
        retries=options.retries,
        hung_after=options.hung_after,
    )


def _conclude(result: StudyResult, *, as_json: bool) -> int:
    if result.is_smoke:
        from thalweg.lab.config.smoke_run import WARNING

        err(f"thalweg: {WARNING}")
    if as_json:
        out_json(_as_data(result))
        return result.exit_code
    _print_verdicts(result.verdicts)
    if result.report is not None:
        out(f"figures  {result.study.path / 'figures'}")
        out(f"report   {result.report}")
    return result.exit_code


def _as_data(result: StudyResult) -> dict[str, Any]:
    return {
        "study": str(result.study.path),
        "report": None if result.report is None else str(result.report),
        "verdicts": [] if result.report is None else result.study.read_verdicts(),
        "exit_code": result.exit_code,
    }


def _print_verdicts(verdicts: Sequence[Verdict]) -> None:
    if verdicts:
        from rich.console import Console

        from thalweg.analysis.claims.verdicts import render_verdicts

        Console().print(render_verdicts(verdicts))


def progress_of(options: argparse.Namespace, command: str | None = None) -> Progress:
    from thalweg.lab.progress import Progress

    return Progress.to_stderr(quiet=options.quiet, command=command)
