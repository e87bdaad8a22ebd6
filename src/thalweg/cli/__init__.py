"""The command line: `thalweg reproduce`, and the verbs around it.

Results go to standard output, words for people to standard error. Exit status: 0 done, 1 an error
on the way, 2 bad input, 3 diverged, 4 a file is not what was written, 75 interrupted and resumable.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from thalweg.cli.output import err
from thalweg.cli.parser import build_parser, take_overrides
from thalweg.errors import Interrupted, ThalwegError

__all__ = ["build_parser", "main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; ends the process with the documented exit status."""
    try:
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


def _run(arguments: list[str]) -> int:
    parser, verbs = build_parser()
    words, overrides = take_overrides(arguments, verbs)
    options = parser.parse_args(words)
    if getattr(options, "handler", None) is None:
        parser.print_help(sys.stderr)
        return 2
    options.overrides = overrides
    return options.handler(options)
