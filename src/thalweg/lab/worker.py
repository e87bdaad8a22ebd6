"""What one process does: one run of a study, with its own threads, signals and exit status.

A process a run: a crash or running out of memory stays its own.
"""

from __future__ import annotations

import signal
import sys
import tomllib
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from thalweg.errors import Diverged, InvalidInput, ThalwegError
from thalweg.lab.registry import load_plugin
from thalweg.lab.spec import parse_spec
from thalweg.lab.store import StudyFolder
from thalweg.lab.store.status import Status

STOP_SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")


def work(
    study_path: str, seed: int, branch: str, device: str, threads: int, plugins: Sequence[str]
) -> None:
    """Execute one run; the process ends with the exit status of what happened."""
    import torch

    from thalweg.lab.run import Run

    torch.set_num_threads(threads)
    stopping = _stop_flag()
    study = StudyFolder(Path(study_path))
    folder = study.run(seed, branch)
    try:
        for plugin in plugins:
            load_plugin(plugin)
        spec = parse_spec(tomllib.loads(study.spec_text), source="spec.toml")
        run = Run(spec, study, seed, branch, device=device, should_stop=stopping)
        run.execute()
    except ThalwegError as error:
        if not isinstance(error, Diverged) and error.exit_code != 75:
            _note_failure(folder, str(error))
        sys.exit(error.exit_code)
    except BaseException as error:
        # Not the user's mistake: the whole trace belongs in the log.
        folder.log(traceback.format_exc())
        _note_failure(folder, f"{type(error).__name__}: {error}")
        sys.exit(1)


def _note_failure(folder: object, message: str) -> None:
    from thalweg.lab.store import RunFolder

    assert isinstance(folder, RunFolder)
    try:
        known = folder.status()
        step = known.step if known else 0
        folder.write_status(Status("failed", step=step, message=message))
        folder.log(f"failed: {message}")
    except (ThalwegError, OSError):
        # Nothing can be written: the exit status and standard error still tell.
        print(f"thalweg: {folder.path}: {message}", file=sys.stderr)  # noqa: T201


def _stop_flag() -> Callable[[], bool]:
    """Turn the signals that ask to stop into a flag that the loop reads between two steps."""
    stop = False

    def note(signum: int, frame: object) -> None:
        nonlocal stop
        stop = True

    for name in STOP_SIGNALS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), note)
    return lambda: stop


def measure(spec_text: str, device: str, threads: int, plugins: Sequence[str]) -> dict[str, object]:
    """Time a few steps; also chooses how to multiply by the Hessian on this machine.

    Returns plain numbers: seconds of one gradient of the full loss, of a step with the optimizer
    alone, and of a tracked step; the way to multiply; P, N and k.
    """
    import time

    import torch

    from thalweg.curvature import SubspaceTracker
    from thalweg.lab.problems import build_problem
    from thalweg.lab.run import make_objective, number_of_directions

    torch.set_num_threads(threads)
    for plugin in plugins:
        load_plugin(plugin)
    spec = parse_spec(tomllib.loads(spec_text), source="spec.toml")
    problem = build_problem(spec.problem, spec.seeds[0], getattr(torch, spec.dtype), device)
    objective = make_objective(spec, problem)
    k = number_of_directions(spec, problem, objective)
    if k > objective.num_parameters:
        raise InvalidInput(
            f"subspace.k: got {k}, allowed: at most the number of parameters,"
            f" {objective.num_parameters}"
        )

    def seconds(call: Callable[[], object], times: int = 3) -> float:
        call()
        begin = time.perf_counter()
        for _ in range(times):
            call()
        return (time.perf_counter() - begin) / times

    gradient = seconds(objective.gradient)
    size = spec.phases[-1].batch_size
    batch = torch.arange(problem.num_samples if size == "all" else size)
    step = seconds(lambda: objective.gradient(samples=batch))
    tracker = SubspaceTracker(objective, k, exact=spec.subspace.source == "exact")
    tracker.update()
    tracked = seconds(tracker.update)
    return {
        "gradient": gradient,
        "step": step,
        "tracked": tracked,
        "method": objective.method if objective.method != "auto" else "graph",
        "num_parameters": objective.num_parameters,
        "num_samples": objective.num_samples,
        "k": k,
        "notes": list(problem.notes),
    }
