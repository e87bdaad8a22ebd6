"""The n-th operation on the files of a study kills its process, or fails with an error of the disk.

`armed` writes a plugin, which `thalweg --plugin` loads in the study's process and in each run's:
from then on Python's own audit events count what is opened, made, renamed and removed below a
folder, and a stand-in for `os.fsync` counts what is flushed. Nothing of Thalweg is replaced.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

EVENTS = frozenset(("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"))
STUDY = "thalweg"
"""Name of the process that runs the command; any other is a run's."""


@dataclass(frozen=True)
class Harm:
    """What happens, and when.

    Attributes:
        kind: "kill", "count" (into a file, a byte an operation), or the name of an error: "EIO".
        root: operations below this folder count.
        at: the first operation that it strikes, from 1.
        lasting: whether it strikes all later ones too.
        where: in the study's process, or in those of its runs.
        tally: folder of the files of "count".
    """

    kind: str
    root: str
    at: int = 1
    lasting: bool = False
    where: Literal["study", "run"] = "run"
    tally: str = ""


def armed(harm: Harm, file: Path) -> Path:
    """Write the plugin that does the harm."""
    text = f"from benchmarks.faults.operations import Harm, strike\nstrike(Harm(**{asdict(harm)}))"
    file.write_text(f'"""A fault."""\n\n{text}\n')
    return file


def strike(harm: Harm) -> None:
    """Do the harm in this process, if it is of the kind that is to be harmed."""
    name = multiprocessing.current_process().name
    here = "study" if name in (STUDY, "MainProcess") else "run"
    if here == harm.where:
        _watch_operations(harm.root, _striking(harm))


def _striking(harm: Harm) -> Callable[[str], None]:
    count, tally = 0, -1
    if harm.kind == "count":
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        tally = os.open(Path(harm.tally) / str(os.getpid()), flags)

    def happens(path: str) -> None:
        nonlocal count
        count += 1
        if harm.kind == "count":
            os.write(tally, b".")
        elif count == harm.at or (harm.lasting and count > harm.at):
            if harm.kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            number = getattr(errno, harm.kind)
            raise OSError(number, os.strerror(number), path)

    return happens


def _watch_operations(root: str, happens: Callable[[str], None]) -> None:
    flush = os.fsync

    def heard(event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS and isinstance(arguments[0], (str, bytes, os.PathLike)):
            path = os.fsdecode(arguments[0])
            if path.startswith(root):
                happens(path)

    def fsync(file: Any) -> None:
        number = file if isinstance(file, int) else file.fileno()
        link = Path(f"/proc/self/fd/{number}")
        path = str(link.readlink()) if link.is_symlink() else ""
        if path.startswith(root):
            happens(path)
        flush(file)

    sys.addaudithook(heard)
    os.fsync = fsync
