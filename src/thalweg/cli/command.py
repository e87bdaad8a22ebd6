"""What does a command line give? Its exit status, or that of its error, which is said in a line."""

from __future__ import annotations

import shlex
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from thalweg.cli.output import err
from thalweg.cli.parser import (
    Parser,
    build_parser,
    nearest_option,
    take_overrides,
    with_present_words,
)
from thalweg.errors import DiskFull, Interrupted, InvalidInput, NotNeeded, ThalwegError, shown


def status_of(arguments: list[str]) -> int:
    """Do what the words ask for; return the exit status."""
    command = shlex.join(["thalweg", *arguments])
    try:
        with _warnings_told():
            status = _run(arguments, command)
        sys.stdout.flush()
    except DiskFull as error:
        err(f"thalweg: {error}: {command}")
        return error.exit_code
    except Interrupted as error:
        err(f"thalweg: {error}; to continue: {command}")
        return error.exit_code
    except ThalwegError as error:
        for line in str(error).splitlines():
            err(f"thalweg: {line}")
        return error.exit_code
    except BrokenPipeError:
        # Whoever read the output (`| head`) has had enough; Python would complain once more.
        sys.stdout = None
        return 0
    except OSError as error:
        err(f"thalweg: {error}")
        return 1
    return status


@contextmanager
def _warnings_told() -> Iterator[None]:
    """Say in one line on standard error where a spec has a key by its former name, or a thing is
    given that is not needed.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("always", ".* is called .* now", DeprecationWarning)
        warnings.simplefilter("always", NotNeeded)
        show = warnings.showwarning

        def tell(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if issubclass(category, DeprecationWarning | NotNeeded):
                err(f"thalweg: {message}")
            else:
                show(message, category, *place, **more)

        warnings.showwarning = tell
        yield


def _run(arguments: list[str], command: str) -> int:
    if any("\0" in word for word in arguments):
        raise InvalidInput("command line: got a zero byte, allowed: text")
    arguments, former = with_present_words(arguments)
    for line in former:
        err(f"thalweg: {line}")
    parser, verbs = build_parser()
    words, overrides = take_overrides(arguments, verbs)
    options = parser.parse_args(words)
    if overrides:
        _refuse_misspelt_option(overrides, options.parser)
    if getattr(options, "handler", None) is None:
        parser.print_help(sys.stderr)
        return 2
    options.overrides = overrides
    options.command = command
    with _full_disk_told():
        return options.handler(options)


def _refuse_misspelt_option(overrides: list[str], verb: Parser) -> None:
    """Tell a word that is no key of a spec from an option of the command with a mistake in it."""
    from thalweg.lab.config import Spec
    from thalweg.lab.config.overrides import is_known

    for word in overrides:
        near = nearest_option(word, verb) if word.startswith("--") else None
        if near is not None and not is_known(word[2:].partition("=")[0], Spec):
            raise InvalidInput(
                f"command line: no option or key {shown(word, 80)}; did you mean {near}?"
            )


@contextmanager
def _full_disk_told() -> Iterator[None]:
    """A full disk where no study is concerned, such as that of temporary files."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        from thalweg.lab.store.durable import full_disk_told

        named = error.filename if isinstance(error.filename, str) else "."
        with full_disk_told(Path(named)):
            raise
