"""How is one run of a study executed: in a process of its own, or in this one?"""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from thalweg.errors import Diverged, IntegrityError, Interrupted, ProcessLost, ThalwegError
from thalweg.lab.config import Spec, parse_spec
from thalweg.lab.execution.machine import compute_repeatably
from thalweg.lab.execution.processes import is_asked_to_stop
from thalweg.lab.store import RunFolder, StudyFolder
from thalweg.lab.store.durable import full_disk_told
from thalweg.lab.store.status import State, Status
from thalweg.lab.store.verifying import read_run_table
from thalweg.lab.tables import parse_toml
from thalweg.registry import load_plugin

if TYPE_CHECKING:
    from thalweg.lab.training import Run

PARENT_SECONDS = 1.0
KEPT = ("step", "end_step", "seconds", "loss", "alignment", "sharpness")
"""What the status of a run that ended badly still says."""


def work(
    study_path: str, seed: int, branch: str, device: str, threads: int, plugins: Sequence[str]
) -> None:
    """Execute one run in a process that is there for it alone.

    Raises:
        ThalwegError: what `Run` raises; the run's status and log say it too.
    """
    study = StudyFolder(Path(study_path))
    execute_run(study, seed, branch, device, threads, plugins, _stop_flag())


def execute_run(
    study: StudyFolder,
    seed: int,
    branch: str,
    device: str,
    threads: int,
    plugins: Sequence[str],
    should_stop: Callable[[], bool],
    *,
    spec: Spec | None = None,
) -> None:
    """Execute one run in this process, with its number of threads.

    Args:
        should_stop: asked at every step; True saves a checkpoint and raises `Interrupted`.
        spec: the study's spec; default: what its `spec.toml` says.

    Raises:
        ThalwegError: what `Run` raises; the run's status and log say it too.
    """
    from thalweg.loss.reduce import group_of_all, reduction_of

    folder = study.run(seed, branch)
    if reduction_of(group_of_all()).rank != 0:
        folder = folder.followed()
    try:
        with full_disk_told(folder.path):
            run = _built(study, seed, branch, device, threads, plugins, should_stop, spec)
            run.execute()
    except ProcessLost as error:
        # By then no run hears of anything.
        note_killed(folder, str(error))
        raise
    except (Diverged, Interrupted):
        raise  # the run has said so itself
    except Exception as error:
        is_known = isinstance(error, ThalwegError)
        _note(folder, "failed", str(error) if is_known else f"{type(error).__name__}: {error}")
        raise


def _built(
    study: StudyFolder,
    seed: int,
    branch: str,
    device: str,
    threads: int,
    plugins: Sequence[str],
    should_stop: Callable[[], bool],
    spec: Spec | None,
) -> Run:
    """Build a run; see `execute_run`."""
    import torch

    from thalweg.lab.training import Run
    from thalweg.loss.reduce import Reduction

    folder = study.run(seed, branch)
    torch.set_num_threads(threads)
    compute_repeatably(device)
    for plugin in plugins:
        load_plugin(plugin)
    spec = spec or parse_spec(parse_toml(study.spec_text, "spec.toml"), source="spec.toml")
    known = read_run_table(folder)
    try:
        run = Run(
            spec,
            study,
            seed,
            branch,
            device=device,
            fingerprint=known.get("data_fingerprint", ""),
            should_stop=should_stop,
        )
    except Diverged as error:
        message = f"before its first step: {error}"
        _note(folder, "diverged", message)
        raise Diverged(message) from error
    recorded = known.get("run_hash", run.hash)
    if recorded != run.hash:
        raise IntegrityError(
            f"{study.path / 'spec.toml'}: its settings are not those that"
            f" {folder.path / 'run.toml'} was written with: one of the two was changed"
        )
    # Processes that share a run ask one another, at its first step.
    if type(run.reduction) is Reduction and should_stop():
        raise Interrupted("stopped on request before its first step")
    return run


def note_killed(folder: RunFolder, message: str) -> None:
    """Say in the folder why the run's process is gone; the run can be continued."""
    _note(folder, "interrupted", message)


def _note(folder: RunFolder, state: State, message: str) -> None:
    """Say in the folder how the run ended, unless it is done or another process is at work on it.

    Where nothing can be written, the study's process alone tells it.
    """
    with contextlib.suppress(ThalwegError, OSError), folder.locked():
        known = folder.status() or Status(state)
        if known.state == "done":
            return
        # Numbers stay those of the last status; who writes it, and when, are those of now.
        kept = {name: getattr(known, name) for name in KEPT}
        folder.write_status(Status(state, message=message, run_hash=folder.hash, **kept))
        folder.log(f"{state}: {message}")


def _stop_flag() -> Callable[[], bool]:
    """Whether the run has been asked to stop: the loop asks between two steps.

    The death of the parent counts as a request: nobody would be left to report to, and a resumed
    study would find its runs in use.
    """
    orphaned = False
    looked = time.monotonic()
    parent = multiprocessing.parent_process()

    def stopping() -> bool:
        nonlocal orphaned, looked
        if parent is not None and time.monotonic() - looked >= PARENT_SECONDS:
            looked = time.monotonic()
            orphaned = orphaned or not parent.is_alive()
        return orphaned or is_asked_to_stop()

    return stopping
