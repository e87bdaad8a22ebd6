"""With which command does a process of its own do a job, and how did that end?

The command is the same everywhere: on a machine of Slurm, in a task of Ray, in a container.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from thalweg.errors import invalid

if TYPE_CHECKING:
    from thalweg.lab.execution.jobs import Job
    from thalweg.lab.execution.schedule import Assignment

POLL_SECONDS = 0.1
SAID_BYTES = 2000
"""How much of what a worker has printed at its end is returned."""


def worker_arguments(job: Job, assignment: Assignment) -> list[str]:
    """What follows `thalweg work`; files are found from any folder.

    Raises:
        InvalidInput: a path with a line break.
    """
    words = [str(job.study.absolute()), "--seed", str(job.seed)]
    words += ["--retries", str(assignment.retries), "--hung-after", f"{assignment.hung_after:g}"]
    for plugin in assignment.plugins:
        words += ["--plugin", str(Path(plugin).absolute()) if plugin.endswith(".py") else plugin]
    for word in words:
        if "\n" in word:
            raise invalid("path of a study or plugin", word, "one without line breaks")
    return words


def run_worker(arguments: Sequence[str], threads: int, folder: str) -> tuple[int, str]:
    """Do a job in a child process; returns its exit status, and what it printed last.

    The status is that of `subprocess`: below 0 where a signal has ended the child.

    KeyboardInterrupt here asks the child to stop: its run saves a checkpoint, and it ends with
    status 75.

    Args:
        arguments: what follows `thalweg work`.
        threads: of a run.
        folder: to work in, if there is one of that name here.
    """
    command = [sys.executable, "-m", "thalweg", "work", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    place = folder if Path(folder).is_dir() else None
    with tempfile.TemporaryFile() as output:
        worker = subprocess.Popen(command, stdout=output, stderr=output, env=environment, cwd=place)
        _wait_for(worker)
        output.seek(max(0, output.seek(0, os.SEEK_END) - SAID_BYTES))
        said = output.read().decode(errors="replace")
    return worker.returncode, said.strip()


def _wait_for(worker: subprocess.Popen[bytes]) -> None:
    try:
        while worker.poll() is None:
            time.sleep(POLL_SECONDS)
    except BaseException as error:
        worker.terminate()
        worker.wait()
        if not isinstance(error, KeyboardInterrupt):
            raise
