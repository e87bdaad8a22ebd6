"""The command line: `thalweg reproduce`, and the verbs around it.

Results go to standard output, words for people to standard error. Exit status: 0 done, 1 an error
on the way, 2 bad input, 3 diverged, 4 a file is not what was written, 75 interrupted and resumable.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from thalweg.cli.interrupting import Interruptions

if TYPE_CHECKING:
    from thalweg.cli.parser import build_parser as build_parser

__all__ = ["build_parser", "main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; ends the process with the documented exit status.

    A signal that asks to stop is heard from here on, before anything else is imported.
    """
    ends_process = arguments is None
    words = list(sys.argv[1:] if arguments is None else arguments)
    with Interruptions(last=ends_process) as interruptions:
        try:
            from thalweg.cli.command import status_of

            status = status_of(words)
        except BaseException as error:
            if not (interruptions.asked or isinstance(error, KeyboardInterrupt)):
                raise
            # Whatever class it has by now: libraries catch it and raise their own.
            interruptions.ignore()
            status = _interrupted(words)
    sys.exit(status)


def _interrupted(words: list[str]) -> int:
    """Say how to go on; the same words always do."""
    from thalweg.cli.output import err
    from thalweg.errors import Interrupted

    size, rank = (os.environ.get(name, "") for name in ("WORLD_SIZE", "RANK"))
    launcher = ["torchrun", "--nproc-per-node", size, "-m"] if size not in ("", "1") else []
    if rank in ("", "0"):
        command = shlex.join([*launcher, "thalweg", *words])
        err(f"thalweg: interrupted; to continue: {command}")
    return Interrupted.exit_code


def __getattr__(name: str) -> Any:
    if name == "build_parser":
        from thalweg.cli.parser import build_parser

        return build_parser
    raise AttributeError(f"module 'thalweg.cli' has no attribute {name!r}")
