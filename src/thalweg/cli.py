"""The command line: `thalweg reproduce`, and the verbs around it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from thalweg import __version__
from thalweg.errors import InvalidInput, ThalwegError, unknown_name

Handler = Callable[[argparse.Namespace], int]


class Parser(argparse.ArgumentParser):
    """Argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage."""
        raise InvalidInput(f"{self.prog}: {message}; see {self.prog} --help")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; ends the process with the documented exit status."""
    try:
        status = _run(list(sys.argv[1:] if arguments is None else arguments))
    except ThalwegError as error:
        for line in str(error).splitlines():
            _err(f"thalweg: {line}")
        status = error.exit_code
    except BrokenPipeError:
        status = 0
    except KeyboardInterrupt:
        status = 75
    sys.exit(status)


def _run(arguments: list[str]) -> int:
    parser, verbs = build_parser()
    words, overrides = _take_overrides(arguments, verbs)
    options = parser.parse_args(words)
    if getattr(options, "handler", None) is None:
        parser.print_help(sys.stderr)
        return 2
    options.overrides = overrides
    return options.handler(options)


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    """The parser, and that of each verb."""
    parser = Parser(
        prog="thalweg",
        description="Follow the dominant Hessian subspace of a network in training, and test"
        " published claims about it.",
        allow_abbrev=False,
        epilog="Start with: thalweg reproduce",
    )
    parser.add_argument("--version", action="version", version=f"thalweg {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=Parser)
    verbs: dict[str, Parser] = {}

    def verb(name: str, handler: Handler, summary: str, example: str, spec: bool = False) -> Parser:
        found = subparsers.add_parser(
            name,
            help=summary,
            description=summary,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog=f"example:\n  {example}"
            + ("\n\nany value of the spec can be set, as in --phases.0.optimizer.lr 0.1" * spec),
        )
        found.set_defaults(handler=handler)
        found.add_argument("--root", default="runs", help="folder of all studies (default: runs)")
        verbs[name] = found
        return found

    reproduce = verb(
        "reproduce",
        _reproduce,
        "Run a study of the paper and test its claims.",
        "thalweg reproduce --problem mnist --data-dir ~/data",
        spec=True,
    )
    reproduce.add_argument("study", nargs="?", default="main", help="which study (default: main)")
    reproduce.add_argument("--problem", default="digits", help="which problem (default: digits)")
    reproduce.add_argument("--data-dir", help="folder or file with the data; else downloaded")
    _execution_options(reproduce)

    run = verb("run", _run_spec, "Run a spec.", "thalweg run my-spec.toml --seeds 0 1", spec=True)
    run.add_argument("spec", help="a TOML file, or the name of a built-in spec")
    _execution_options(run)

    resume = verb("resume", _resume, "Go on with a study.", "thalweg resume main-digits")
    resume.add_argument("study", help="its folder, name, or the beginning of its name")
    _execution_options(resume, dry_run=False)

    claims = verb("claims", _claims, "List the claims and their rules.", "thalweg claims")
    claims.add_argument("--json", action="store_true", help="as JSON")

    listing = verb("list", _list, "List the runs there are.", "thalweg list")
    listing.add_argument("--json", action="store_true", help="as JSON")

    show = verb("show", _show, "Show a study or a run.", "thalweg show main-digits/seed-0/sgd")
    show.add_argument("run", help="STUDY or STUDY/seed-N/BRANCH")
    show.add_argument("--json", action="store_true", help="as JSON")

    compare = verb(
        "compare",
        _compare,
        "Compare runs at their last common measured step.",
        "thalweg compare main-digits/seed-0/sgd main-digits/seed-0/bulk-sgd",
    )
    compare.add_argument("runs", nargs="+", help="STUDY/seed-N/BRANCH")
    compare.add_argument("--json", action="store_true", help="as JSON")

    report = verb(
        "report", _report, "Judge, draw and write the report anew.", "thalweg report main-digits"
    )
    report.add_argument("study", help="its folder, name, or the beginning of its name")
    report.add_argument("--json", action="store_true", help="verdicts as JSON")

    end_phase = verb(
        "end-phase",
        _end_phase,
        "End the current phase of a running run by hand.",
        "thalweg end-phase main-digits/seed-0/trunk",
    )
    end_phase.add_argument("run", help="STUDY/seed-N/BRANCH")

    spec = verb(
        "spec", _spec, "Show the built-in specs.", "thalweg spec show digits --lr 0.1", spec=True
    )
    spec.add_argument("action", choices=["list", "show"], help="list, or show one in full")
    spec.add_argument("spec", nargs="?", help="a TOML file, or the name of a built-in spec")
    spec.add_argument("--plugin", action="append", default=[], help="module or file to import")

    env = verb("env", _env, "Print versions and machine, for bug reports.", "thalweg env")
    env.add_argument("--json", action="store_true", help="as JSON")

    completion = verb(
        "completion",
        lambda options: _completion(parser, options.shell),
        "Print a script for the completion of commands in your shell.",
        "thalweg completion bash > ~/.local/share/bash-completion/completions/thalweg",
    )
    completion.add_argument("shell", choices=["bash", "zsh", "tcsh"])
    return parser, verbs


def _execution_options(parser: Parser, *, dry_run: bool = True) -> None:
    parser.add_argument("--workers", type=int, help="processes side by side (default: the cores)")
    parser.add_argument(
        "--plugin", action="append", default=[], help="module or file with your problems, probes"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="say nothing on the way")
    parser.add_argument("--json", action="store_true", help="verdicts as JSON on standard output")
    if dry_run:
        parser.add_argument("--dry-run", action="store_true", help="print the resolved spec only")


def _take_overrides(arguments: list[str], verbs: dict[str, Parser]) -> tuple[list[str], list[str]]:
    """Part the words of `--some.key VALUE ...` that set values of a spec from the options."""
    name = next((word for word in arguments if not word.startswith("-")), None)
    if name not in ("reproduce", "run", "spec"):
        return arguments, []
    known = {option for action in verbs[name]._actions for option in action.option_strings}
    words: list[str] = []
    overrides: list[str] = []
    into = words
    for word in arguments:
        if word.startswith("--") and len(word) > 2:
            into = words if word.partition("=")[0] in known else overrides
        elif word in known:
            into = words
        into.append(word)
    return words, overrides


def _reproduce(options: argparse.Namespace) -> int:
    from thalweg.lab.study import reproduction_spec

    _load_plugins(options)
    spec = reproduction_spec(
        options.study,
        options.problem,
        data_dir=None if options.data_dir is None else str(Path(options.data_dir).expanduser()),
        overrides=options.overrides,
    )
    return _execute(spec, options)


def _run_spec(options: argparse.Namespace) -> int:
    from thalweg.lab.spec import load_spec

    _load_plugins(options)
    return _execute(load_spec(options.spec, options.overrides), options)


def _execute(spec: Any, options: argparse.Namespace) -> int:
    from thalweg.lab.spec import dump_spec
    from thalweg.lab.study import check_spec, run_study

    _check_workers(options)
    if options.dry_run:
        check_spec(spec)
        _out(dump_spec(spec), end="")
        return 0
    result = run_study(
        spec,
        root=options.root,
        workers=options.workers,
        plugins=options.plugin,
        progress=_progress(options),
    )
    return _conclude(result, options)


def _resume(options: argparse.Namespace) -> int:
    from thalweg.lab.study import resume

    _load_plugins(options)
    _check_workers(options)
    result = resume(
        options.study,
        root=options.root,
        workers=options.workers,
        plugins=options.plugin,
        progress=_progress(options),
    )
    return _conclude(result, options)


def _conclude(result: Any, options: argparse.Namespace) -> int:
    if options.json:
        content = {
            "study": str(result.study.path),
            "report": str(result.report),
            "verdicts": result.study.read_verdicts(),
            "exit_code": result.exit_code,
        }
        _out(json.dumps(content, indent=2))
        return result.exit_code
    _print_verdicts(result)
    return result.exit_code


def _print_verdicts(result: Any) -> None:
    from rich.console import Console

    from thalweg.lab.claims.verdicts import render_verdicts

    if result.verdicts:
        Console().print(render_verdicts(result.verdicts))
    _out(f"figures  {result.study.path / 'figures'}")
    _out(f"report   {result.report}")


def _claims(options: argparse.Namespace) -> int:
    from thalweg.lab.claims.listing import claim_rows

    rows = claim_rows(options.root)
    if options.json:
        _out(json.dumps(rows, indent=2))
        return 0
    for row in rows:
        _out(f"{row['claim']}: {row['statement']}")
        for key in ("source", "statistic", "rule", "refuted_by", "minimum_seeds"):
            _out(f"    {key.replace('_', ' ')}: {row[key]}")
        for problem, verdict in row["verdicts"].items():
            _out(f"    last verdict on {problem}: {verdict}")
    return 0


def _list(options: argparse.Namespace) -> int:
    from dataclasses import asdict

    from thalweg.lab.store import find_studies

    rows = []
    for study in find_studies(options.root):
        for run in study.runs():
            status = run.status()
            state = {"state": "waiting"} if status is None else asdict(status)
            rows.append({"run": f"{study.name}/seed-{run.seed}/{run.branch}", **state})
    if options.json:
        _out(json.dumps(rows, indent=2))
        return 0
    if not rows:
        _err(f"thalweg: no study in {options.root}; start one with: thalweg reproduce")
    for row in rows:
        loss = row.get("loss")
        numbers = f"step {row.get('step', 0)}" + (f", loss {loss:.4g}" if loss is not None else "")
        _out(f"{row['run']}  {row['state']}  {numbers}")
    return 0


def _show(options: argparse.Namespace) -> int:
    from thalweg.lab.inspection import describe

    description = describe(options.run, options.root)
    if options.json:
        _out(json.dumps(description, indent=2))
        return 0
    for key, value in description.items():
        _out(f"{key}: {value}")
    return 0


def _compare(options: argparse.Namespace) -> int:
    from thalweg.lab.inspection import compare

    table = compare(options.runs, options.root)
    _out(str(table.to_json(orient="index", indent=2)) if options.json else table.to_string())
    return 0


def _report(options: argparse.Namespace) -> int:
    import tomllib

    from thalweg.lab.spec import parse_spec
    from thalweg.lab.store import open_study
    from thalweg.lab.study import conclude

    study = open_study(options.study, options.root)
    spec = parse_spec(tomllib.loads(study.spec_text), source=str(study.path / "spec.toml"))
    return _conclude(conclude(study, spec), options)


def _end_phase(options: argparse.Namespace) -> int:
    from thalweg.lab.inspection import open_run
    from thalweg.lab.run_names import END_PHASE

    run = open_run(options.run, options.root)
    status = run.status()
    if status is None or status.state != "running":
        state = "not begun" if status is None else status.state
        raise InvalidInput(f"{options.run}: it is {state}; only a running run can end its phase")
    (run.path / END_PHASE).touch()
    return 0


def _spec(options: argparse.Namespace) -> int:
    from thalweg.lab.spec import builtin_specs, dump_spec, load_spec

    _load_plugins(options)
    if options.action == "list":
        for name, description in builtin_specs().items():
            _out(f"{name:32} {description}")
        return 0
    if options.spec is None:
        raise unknown_name("spec", "", builtin_specs())
    _out(dump_spec(load_spec(options.spec, options.overrides)), end="")
    return 0


def _env(options: argparse.Namespace) -> int:
    from thalweg.lab.store.environment import environment

    found = environment()
    if options.json:
        _out(json.dumps(found, indent=2))
        return 0
    for key, value in found.items():
        _out(f"{key}: {value}")
    return 0


def _completion(parser: Parser, shell: str) -> int:
    import shtab

    _out(shtab.complete(parser, shell))
    return 0


def _load_plugins(options: argparse.Namespace) -> None:
    from thalweg.lab.registry import load_plugin

    for plugin in options.plugin:
        load_plugin(plugin)


def _check_workers(options: argparse.Namespace) -> None:
    if options.workers is not None and options.workers < 1:
        raise InvalidInput(f"--workers: got {options.workers}, allowed: an integer >= 1")


def _progress(options: argparse.Namespace) -> Any:
    from thalweg.lab.progress import Progress

    return Progress.to_stderr(quiet=options.quiet)


def _out(text: str, end: str = "\n") -> None:
    sys.stdout.write(text + end)


def _err(text: str) -> None:
    sys.stderr.write(text + "\n")
