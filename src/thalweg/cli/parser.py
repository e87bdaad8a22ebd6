"""Which commands and options are there? Any value of a spec is an option too, by its key path."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable
from math import inf
from typing import Any, NoReturn

from thalweg import __version__
from thalweg.cli import inspecting, looking, studying, sweeping
from thalweg.cli.output import out
from thalweg.errors import InvalidInput, shown, unknown_name

Handler = Callable[[argparse.Namespace], int]

HUNG_AFTER = 30.0
SWEEP_RETRIES = 2
"""Those of `thalweg.lab`, which is imported with the command that needs it."""

WITH_OVERRIDES = ("reproduce", "run", "sweep", "spec")
OVERRIDES = """
any value of the spec is an option, by its key path: --phases.0.optimizer.lr 0.1
of every phase, if it begins with a key of one: --optimizer.momentum 0.9
short forms: --lr, --batch-size, --steps (of the branches), --samples, --k, --seeds 0..4
"""


FORMER_WORDS = {"--neighbours": "--extensions", "end-phase": "stop-phase"}
"""Words by what they were called before; these are read for one version."""


class Parser(argparse.ArgumentParser):
    """Argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage."""
        raise InvalidInput(f"{self.prog}: {message}; see {self.prog} --help")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse does, but an option that there is not is told with the nearest one."""
        options, left = self.parse_known_args(args, namespace)
        if left:
            verb: Parser = getattr(options, "parser", self)
            near = nearest_option(left[0], verb)
            hint = f"; did you mean {near}?" if near else f"; see {verb.prog} --help"
            raise InvalidInput(f"{verb.prog}: no option {shown(left[0], 80)}{hint}")
        return options

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Refuse a word that is not among the choices, with the nearest one."""
        if action.choices is not None and value not in action.choices:
            raise unknown_name(str(action.metavar or action.dest).lower(), value, action.choices)


class Verbs:
    """Collects the commands, each with its example."""

    def __init__(self, parser: Parser) -> None:
        self._subparsers = parser.add_subparsers(
            title="commands", metavar="COMMAND", parser_class=Parser
        )
        self.parsers: dict[str, Parser] = {}
        self.examples: list[str] = []

    def add(
        self, name: str, handler: Handler, summary: str, example: str, *, json: str | None = None
    ) -> Parser:
        """A command; `json` says what it prints as JSON, if it can."""
        overrides = OVERRIDES if name in WITH_OVERRIDES else ""
        found = self._subparsers.add_parser(
            name,
            help=summary,
            description=summary,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog=f"example:\n  {example}\n{overrides}",
        )
        found.set_defaults(handler=handler, parser=found)
        if json is not None:
            found.add_argument("--json", action="store_true", help=f"{json} as JSON")
        self.parsers[name] = found
        self.examples.append(example)
        return found


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    """The parser, and that of each command."""
    parser = Parser(
        prog="thalweg",
        description="Follow the dominant Hessian subspace of a network in training, and test"
        " published claims about it.",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"thalweg {__version__}")
    verbs = Verbs(parser)
    _add_studying(verbs)
    _add_sweeping(verbs)
    _add_looking(verbs)
    completion = verbs.add(
        "completion",
        lambda options: _completion(parser, options.shell),
        "Print a script for the completion of commands in your shell.",
        "thalweg completion bash > ~/.local/share/bash-completion/completions/thalweg",
    )
    completion.add_argument("shell", choices=["bash", "zsh", "tcsh"])
    parser.epilog = "examples:\n" + "\n".join(f"  {example}" for example in verbs.examples)
    return parser, verbs.parsers


def with_present_words(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The command line with words as they are called now, and what to tell about former ones."""
    command = next((word for word in arguments if not word.startswith("-")), None)
    former = [word for word in FORMER_WORDS if word == command or word in arguments[:1]]
    former += [word for word in FORMER_WORDS if word.startswith("--") and word in arguments]
    told = [f"{word} is called {FORMER_WORDS[word]} now" for word in dict.fromkeys(former)]
    return [FORMER_WORDS[word] if word in former else word for word in arguments], told


def nearest_option(word: str, verb: Parser) -> str | None:
    """The option of a command that is nearest to a word, None where none is near."""
    given = word.partition("=")[0].replace("_", "-")
    near = difflib.get_close_matches(given, verb._option_string_actions, n=1, cutoff=0.7)
    return near[0] if near else None


def take_overrides(arguments: list[str], verbs: dict[str, Parser]) -> tuple[list[str], list[str]]:
    """Part the words of `--some.key VALUE ...` that set values of a spec from the options."""
    name = next((word for word in arguments if not word.startswith("-")), None)
    if name not in WITH_OVERRIDES:
        return arguments, []
    known = set(verbs[name]._option_string_actions)
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


def _add_studying(verbs: Verbs) -> None:
    reproduce = verbs.add(
        "reproduce",
        studying.reproduce,
        "Run a study of the paper and test its claims.",
        "thalweg reproduce --problem mnist --data-dir ~/data",
    )
    reproduce.add_argument(
        "study", nargs="?", help="which study, see thalweg spec list (default: main)"
    )
    reproduce.add_argument(
        "--all", action="store_true", help="all studies of the paper in turn, and one report"
    )
    reproduce.add_argument(
        "--extensions", action="store_true", help="the same for the methods around the paper"
    )
    reproduce.add_argument("--problem", help="which problem (default: digits, for most)")
    reproduce.add_argument("--data-dir", help="folder or file with the data; else downloaded")
    _executor(reproduce)
    _execution_options(reproduce)
    _trying_out(reproduce)

    run = verbs.add("run", studying.run, "Run a spec.", "thalweg run my-spec.toml --seeds 0 1")
    run.add_argument("spec", help="a TOML file, or the name of a built-in spec")
    _executor(run)
    _execution_options(run)
    _trying_out(run)

    resume = verbs.add(
        "resume", studying.resume, "Continue a study or a sweep.", "thalweg resume main-digits"
    )
    _study(resume)
    _executor(resume)
    _execution_options(resume)

    report = verbs.add(
        "report",
        studying.report,
        "Judge, draw and write the report anew.",
        "thalweg report main-digits",
        json="verdicts",
    )
    _study(report)
    for option, what in (
        ("--axes", "of a sweep: the key across, and the one upwards"),
        ("--statistic", "of a sweep: what is drawn (default: loss)"),
        ("--branch", "of a sweep: whose (default: the plain one)"),
    ):
        count = "+" if option == "--axes" else None
        report.add_argument(option, nargs=count, metavar="NAME", help=what)
    _plugins(report)
    _root(report)

    stop_phase = verbs.add(
        "stop-phase",
        studying.stop_phase,
        "End the current phase of a running run by hand.",
        "thalweg stop-phase main-digits/seed-0/trunk",
    )
    stop_phase.add_argument("run", help="STUDY/seed-N/BRANCH")
    _root(stop_phase)


def _add_sweeping(verbs: Verbs) -> None:
    sweep = verbs.add(
        "sweep",
        sweeping.sweep,
        "Run a grid of settings; or status, cancel, collect of one.",
        "thalweg sweep digits --grid lr=0.01,0.03,0.1 --grid batch_size=10,50,all --seeds 0..4",
    )
    sweep.add_argument(
        "words",
        nargs="+",
        metavar="SPEC",
        help="a TOML file, or the name of a built-in spec or study; or: status, cancel or collect"
        " and a sweep",
    )
    for option, what in (
        ("--grid", "KEY=V,V: all combinations; KEY=log:LOW:HIGH:COUNT, linear:LOW:HIGH:COUNT"),
        ("--zip", "the same, side by side"),
        ("--random", "KEY=log:LOW:HIGH, linear:LOW:HIGH or V,V: drawn, with --draws"),
    ):
        sweep.add_argument(
            option, nargs="+", action="extend", default=[], metavar="KEY=VALUES", help=what
        )
    sweep.add_argument("--draws", type=_count, metavar="N", help="points that are drawn")
    sweep.add_argument(
        "--draw-seed", type=_count_from_zero, default=0, metavar="N", help="seed of the drawing"
    )
    sweep.add_argument(
        "--search", type=_count, metavar="TRIALS", help="let Optuna choose points of --random"
    )
    sweep.add_argument("--minimize", metavar="COLUMN", help="what is searched for (default: loss)")
    sweep.add_argument("--maximize", metavar="COLUMN", help="the same, for the greatest value")
    sweep.add_argument("--of", metavar="BRANCH", help="whose (default: the plain branch)")
    sweep.add_argument("--problem", help="of a study (default: its own)")
    sweep.add_argument("--data-dir", help="folder or file with the data; else downloaded")
    sweep.add_argument("--name", help="of the sweep's folder (default: made of spec and keys)")
    sweep.add_argument(
        "--executor",
        help=f"local, lockstep, slurm, ray, or a plugin's (default: {_USUAL})",
    )
    sweep.add_argument(
        "--executor-option",
        type=_option,
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="of slurm any option of sbatch, such as time=1:00:00; of ray gpus=0.25",
    )
    _execution_options(sweep, retries=SWEEP_RETRIES)
    _trying_out(sweep, "say how many runs, how much disk and time")

    work = verbs.add(
        "work",
        sweeping.work,
        "Do runs of a study or sweep that no process is at work on.",
        "thalweg work runs/sweep-main-digits --workers 2",
    )
    work.add_argument("name", help="of a study or sweep: its folder, its name, or its beginning")
    work.add_argument(
        "--seed", type=_count_from_zero, nargs="+", metavar="N", help="only these (default: all)"
    )
    _executor(work, default="local")
    _execution_options(work)


def _add_looking(verbs: Verbs) -> None:
    listing = verbs.add(
        "list", looking.list_runs, "List the runs there are.", "thalweg list", json="the runs"
    )
    _root(listing)

    show = verbs.add(
        "show",
        looking.show,
        "Show a study or a run.",
        "thalweg show main-digits/seed-0/sgd",
        json="all that is known",
    )
    show.add_argument("run", help="STUDY or STUDY/seed-N/BRANCH")
    _root(show)

    compare = verbs.add(
        "compare",
        looking.compare,
        "Compare runs at their last common measured step.",
        "thalweg compare main-digits/seed-0/sgd main-digits/seed-0/bulk-sgd",
        json="the table",
    )
    compare.add_argument("runs", nargs="+", metavar="run", help="STUDY/seed-N/BRANCH")
    _root(compare)

    check = verbs.add(
        "check",
        looking.check,
        "Verify every file of a study, or go back to its newest good state.",
        "thalweg check main-digits",
        json="the findings",
    )
    _study(check)
    check.add_argument(
        "--repair",
        action="store_true",
        help="move what is bad aside, so that thalweg resume runs it again",
    )
    _plugins(check)
    _root(check)

    claims = verbs.add(
        "claims",
        looking.claims,
        "List the claims, their rules and the last verdicts.",
        "thalweg claims",
        json="the claims",
    )
    _root(claims)

    inspect = verbs.add(
        "inspect",
        inspecting.inspect,
        "Tell the curvature of a saved model.",
        "thalweg inspect my-gpt2 --data text.txt --page curvature.html",
        json="the numbers",
    )
    inspect.add_argument("model", help="a folder of transformers, or a .safetensors file")
    inspect.add_argument("--data", help="a text; with --problem the folder of its data")
    inspect.add_argument("--problem", help="the problem that a .safetensors file belongs to")
    inspect.add_argument("--samples", type=_count, default=32, help="sequences (default: 32)")
    inspect.add_argument(
        "--context", type=_count, default=128, help="tokens in each (default: 128)"
    )
    inspect.add_argument("--k", type=_count, default=10, help="eigenvalues (default: 10)")
    inspect.add_argument("--page", metavar="FILE", help="write the tables as a page, too")
    _plugins(inspect)

    spec = verbs.add(
        "spec",
        looking.spec,
        "List the built-in specs, or show one in full.",
        "thalweg spec show digits --lr 0.1",
    )
    spec.add_argument("action", choices=["list", "show"], help="list, or show one in full")
    spec.add_argument("spec", nargs="?", help="a TOML file, or the name of a built-in spec")
    _plugins(spec)

    verbs.add(
        "env",
        looking.env,
        "Print versions and machine, for bug reports.",
        "thalweg env",
        json="versions and machine",
    )


_USUAL = "lockstep on a CUDA device and for what was begun so, else local"


def _executor(parser: Parser, default: str | None = None) -> None:
    parser.add_argument(
        "--executor",
        default=default,
        help="local: a process for each run; lockstep: one computation for those that can share it;"
        f" inline; or a plugin's (default: {default or _USUAL})",
    )


def _execution_options(parser: Parser, retries: int = 0) -> None:
    parser.add_argument(
        "--workers", type=_count, help="processes side by side (default: the cores)"
    )
    parser.add_argument(
        "--retries",
        type=_count_from_zero,
        default=retries,
        metavar="TIMES",
        help="begin a run again whose process was killed or hung (default: %(default)s)",
    )
    parser.add_argument(
        "--hung-after",
        type=_minutes,
        default=HUNG_AFTER,
        metavar="MINUTES",
        help="end a process without a sign of life for so long (default: %(default)g; 0: never)",
    )
    _plugins(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="say only what went wrong")
    parser.add_argument("--json", action="store_true", help="verdicts as JSON on standard output")
    _root(parser)


def _count(word: str, least: int = 1) -> int:
    """A number of few digits: Python reads no others."""
    if not (word.isascii() and word.isdigit() and len(word) <= 6 and int(word) >= least):
        raise argparse.ArgumentTypeError(f"got {shown(word, 80)}, allowed: an integer >= {least}")
    return int(word)


def _count_from_zero(word: str) -> int:
    return _count(word, least=0)


def _option(text: str) -> tuple[str, str]:
    """An option of an executor: its name, and its value; empty where it takes none."""
    key, _, value = text.partition("=")
    return key, value


def _minutes(word: str) -> float:
    try:
        minutes = float(word)
    except ValueError:
        minutes = -1.0
    if not 0 <= minutes < inf:
        raise argparse.ArgumentTypeError(f"got {shown(word, 80)}, allowed: minutes, or 0 for never")
    return minutes


def _trying_out(parser: Parser, dry: str = "print the resolved spec only") -> None:
    parser.add_argument("--dry-run", action="store_true", help=dry)
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="make everything tiny, to see in seconds whether it runs; one seed, if none is given",
    )


def _root(parser: Parser) -> None:
    parser.add_argument("--root", default="runs", help="folder of all studies (default: runs)")


def _study(parser: Parser) -> None:
    parser.add_argument("study", help="its folder, name, or the beginning of its name")


def _plugins(parser: Parser) -> None:
    parser.add_argument(
        "--plugin",
        action="append",
        default=[],
        help="module or .py file that registers your own problems and probes",
    )


def _completion(parser: Parser, shell: str) -> int:
    import shtab

    out(shtab.complete(parser, shell))
    return 0
