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

if TYPE_CHECKING:
    from thalweg.lab.execution.jobs import Job

POLL_SECONDS = 0.1
SAID_BYTES = 2000
"""How much of what a worker has printed at its end is returned."""


def worker_arguments(job: Job, plugins: Sequence[str]) -> list[str]:
    """What follows `thalweg work`; plugins in files are found from any folder."""
    words = [str(job.study.absolute()), "--seed", str(job.seed)]
    for plugin in plugins:
        words += ["--plugin", str(Path(plugin).absolute()) if plugin.endswith(".py") else plugin]
    return words


def run_worker(arguments: Sequence[str], threads: int, folder: str) -> tuple[int, str]:
    """Do a job in a child process; returns its exit status, and what it printed last.

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
