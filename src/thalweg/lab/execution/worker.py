"""How is one run of a study executed: in a process of its own, or in this one?"""

from __future__ import annotations

import contextlib
import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from thalweg.errors import (
    Diverged,
    IntegrityError,
    Interrupted,
    InvalidInput,
    ProcessLost,
    ThalwegError,
)
from thalweg.lab.config import Spec, parse_spec
from thalweg.lab.execution.machine import compute_repeatably
from thalweg.lab.execution.processes import Ending, is_asked_to_stop
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


def work_together(
    runs: Sequence[tuple[str, int, str]], device: str, threads: int, plugins: Sequence[str]
) -> list[tuple[int, str, None, str]] | str:
    """Execute runs that share a computation, in a process that is there for them alone.

    Args:
        runs: folder of the study, seed and branch of each.

    Returns:
        How each ended, as the first values of an `Ending`; or why they cannot share a computation:
        each can go on by itself.
    """
    from thalweg.lab.training.lockstep import LockstepRuns

    asked = _stop_flag()
    endings: dict[int, Exception | None] = {}
    built: dict[int, Run] = {}
    for number, (study, seed, branch) in enumerate(runs):
        place = (StudyFolder(Path(study)), seed, branch)
        with _told(place[0].run(seed, branch), endings, number):
            built[number] = _built(*place, device, threads, plugins, asked, None)
    try:
        ended = LockstepRuns(list(built.values())).execute() if built else []
    except InvalidInput as error:
        return str(error)
    for number, error in zip(built, ended, strict=True):
        with _told(built[number].folder, endings, number):
            if error is not None:
                raise error
    return [_plain(endings[number]) for number in range(len(runs))]


@contextlib.contextmanager
def _told(folder: RunFolder, endings: dict[int, Exception | None], number: int) -> Iterator[None]:
    """Note how one of several runs ended, in its folder too."""
    endings[number] = None
    try:
        with _failure_noted(folder):
            yield
    except Exception as error:
        if not isinstance(error, ThalwegError):
            # Not the user's mistake, so the place is wanted.
            with contextlib.suppress(ThalwegError, OSError):
                folder.log("".join(traceback.format_exception(error)))
        endings[number] = error


def _plain(error: Exception | None) -> tuple[int, str, None, str]:
    if error is None:
        return 0, "", None, ""
    ending = Ending.by_error(error)
    return ending.exit_code, ending.message, None, ending.kind


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
    with _failure_noted(folder):
        run = _built(study, seed, branch, device, threads, plugins, should_stop, spec)
        run.execute()


@contextlib.contextmanager
def _failure_noted(folder: RunFolder) -> Iterator[None]:
    """Say in a run's folder what went wrong with it, where the run has not said so itself."""
    try:
        with full_disk_told(folder.path):
            yield
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
            f"{study.spec_file}: its settings are not those that"
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
