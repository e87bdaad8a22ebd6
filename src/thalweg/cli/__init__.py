"""The command line: `thalweg reproduce`, and the verbs around it.

Results go to standard output, words for people to standard error. Exit status: 0 done, 1 an error
on the way, 2 bad input, 3 diverged, 4 a file is not what was written, 75 interrupted and resumable.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from thalweg.cli.output import err
from thalweg.cli.parser import build_parser, take_overrides, with_present_words
from thalweg.errors import Interrupted, InvalidInput, ThalwegError

__all__ = ["build_parser", "main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; ends the process with the documented exit status."""
    try:
        with _former_keys_told():
            status = _run(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
    except ThalwegError as error:
        for line in str(error).splitlines():
            err(f"thalweg: {line}")
        status = error.exit_code
    except BrokenPipeError:
        # Whoever read the output (`| head`) has had enough; Python would complain once more.
        sys.stdout = None
        status = 0
    except OSError as error:
        err(f"thalweg: {error}")
        status = 1
    except KeyboardInterrupt:
        err("thalweg: interrupted")
        status = Interrupted.exit_code
    sys.exit(status)


@contextmanager
def _former_keys_told() -> Iterator[None]:
    """Say in one line on standard error where a spec has a key by its former name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("always", ".* is called .* now", DeprecationWarning)
        show = warnings.showwarning

        def tell(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if issubclass(category, DeprecationWarning):
                err(f"thalweg: {message}")
            else:
                show(message, category, *place, **more)

        warnings.showwarning = tell
        yield


def _run(arguments: list[str]) -> int:
    if any("\0" in word for word in arguments):
        raise InvalidInput("command line: got a zero byte, allowed: text")
    arguments, former = with_present_words(arguments)
    for line in former:
        err(f"thalweg: {line}")
    parser, verbs = build_parser()
    words, overrides = take_overrides(arguments, verbs)
    options = parser.parse_args(words)
    if getattr(options, "handler", None) is None:
        parser.print_help(sys.stderr)
        return 2
    options.overrides = overrides
    return options.handler(options)
