"""How is one run of a study executed: in a process of its own, or in this one?"""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from thalweg.errors import Diverged, IntegrityError, Interrupted, ThalwegError
from thalweg.lab.config import Spec, parse_spec
from thalweg.lab.execution.machine import compute_repeatably
from thalweg.lab.store import RunFolder, StudyFolder
from thalweg.lab.store.status import Status
from thalweg.lab.store.verifying import read_run_table
from thalweg.lab.tables import parse_toml
from thalweg.registry import load_plugin

STOP_SIGNALS = ("SIGTERM", "SIGUSR1")
PARENT_SECONDS = 1.0


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
    folder = study.run(seed, branch)
    try:
        import torch

        from thalweg.lab.training import Run

        torch.set_num_threads(threads)
        compute_repeatably(device)
        for plugin in plugins:
            load_plugin(plugin)
        spec = spec or parse_spec(parse_toml(study.spec_text, "spec.toml"), source="spec.toml")
        known = read_run_table(folder)
        run = Run(
            spec,
            study,
            seed,
            branch,
            device=device,
            fingerprint=known.get("data_fingerprint", ""),
            should_stop=should_stop,
        )
        recorded = known.get("run_hash", run.hash)
        if recorded != run.hash:
            raise IntegrityError(
                f"{study.path / 'spec.toml'}: its settings are not those that"
                f" {folder.path / 'run.toml'} was written with: one of the two was changed"
            )
        run.execute()
    except (Diverged, Interrupted):
        raise  # the run has said so itself
    except Exception as error:
        is_known = isinstance(error, ThalwegError)
        _note_failure(folder, str(error) if is_known else f"{type(error).__name__}: {error}")
        raise


def _note_failure(folder: RunFolder, message: str) -> None:
    """Say in the folder that the run failed, unless another process is at work on it."""
    try:
        with folder.locked():
            known = folder.status()
            if known is not None and known.state == "done":
                return
            step = known.step if known else 0
            folder.write_status(Status("failed", step=step, message=message, run_hash=folder.hash))
            folder.log(f"failed: {message}")
    except (ThalwegError, OSError):
        return  # nothing can be written: the parent tells


def _stop_flag() -> Callable[[], bool]:
    """Turn the signals that ask to stop into a flag that the loop reads between two steps.

    The death of the parent counts as one: nobody would be left to report to, and a resumed study
    would find its runs in use.
    """
    asked = False
    looked = time.monotonic()

    def note(signum: int, frame: object) -> None:
        nonlocal asked
        asked = True

    for name in STOP_SIGNALS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), note)
    parent = multiprocessing.parent_process()

    def stopping() -> bool:
        nonlocal asked, looked
        if not asked and parent is not None and time.monotonic() - looked >= PARENT_SECONDS:
            looked = time.monotonic()
            asked = not parent.is_alive()
        return asked

    return stopping
