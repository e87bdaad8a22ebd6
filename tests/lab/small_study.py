"""Studies that take a second, and what they left, for comparing to the last bit."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from thalweg.lab.config import Spec, dump_spec, parse_spec
from thalweg.lab.execution.local import GRACE_SECONDS
from thalweg.lab.execution.processes import Child
from thalweg.lab.execution.schedule import tasks_of
from thalweg.lab.execution.worker import work
from thalweg.lab.preparing import create_runs
from thalweg.lab.sharing import this_maker
from thalweg.lab.store import StudyFolder
from thalweg.lab.store.checkpoint import latest_checkpoint, load_checkpoint
from thalweg.lab.training import Run

PLUGIN = str(Path(__file__).with_name("plugin_of_tests.py"))

RAW: dict[str, Any] = {
    "name": "small",
    "seeds": [0],
    "problem": {
        "data": {"name": "digits"},
        "samples": 200,
        "test_samples": 50,
        "preprocess": "unit",
        "model": {"name": "mlp", "hidden": [12], "activation": "tanh"},
        "loss": "mse",
        # Not chosen by measuring: two studies of one test must compute alike.
        "chunk_size": 256,
        "vectorize_up_to": 0,
    },
    "subspace": {"k": 3},
    "phases": [{"optimizer": {"name": "sgd", "lr": 0.05}, "batch_size": 20, "steps": 12}],
    "branches": {
        "sgd": {"steps": 12},
        "dom-sgd": {"steps": 12, "split": {"dominant": 1.0, "bulk": 0.0}},
        "bulk-sgd": {"steps": 12, "split": {"dominant": 0.0, "bulk": 1.0}},
    },
    "probes": {
        "loss": 1,
        "test": 5,
        "sharpness": 3,
        "alignment_gradient": 3,
        "alignment_update": 3,
        "norms": 3,
        "displacement": 3,
        "overlap": 3,
        "subspace_cost": 3,
        "solved_eigenvalues": 10,
    },
    "checkpoint": {"every_steps": 4, "every_seconds": 0.0},
}


def small_spec(changes: dict[str, Any] | None = None) -> Spec:
    """The small spec, with values by key path changed (`{"phases.0.steps": 5}`)."""
    return parse_spec(copy.deepcopy(RAW), overrides=changes or {})


def without_probes(spec: Spec) -> Spec:
    """The same spec, measuring nothing."""
    return spec.model_copy(update={"probes": {}})


def begin(folder: Path, spec: Spec) -> StudyFolder:
    """The folder of a study in which nothing has run yet."""
    study = StudyFolder.create(folder.parent, folder.name, dump_spec(spec))
    tasks = tasks_of(spec)
    create_runs(study, spec, tasks, "", this_maker("cpu"), tasks)
    return study


def execute(study: StudyFolder, spec: Spec, *branches: str, seed: int = 0) -> None:
    """Run these branches in this process, from where they stand to their end."""
    for branch in branches:
        Run(spec, study, seed, branch).execute()


def in_a_process(
    study: StudyFolder, branch: str, *, seed: int = 0, plugins: Sequence[str] = ()
) -> Child:
    """Begin a run as the scheduler does."""
    log = study.run(seed, branch).path / "log.txt"
    arguments = (str(study.path), seed, branch, "cpu", 1, plugins)
    return Child(work, arguments, log, grace=GRACE_SECONDS)


def left(study: StudyFolder, branch: str, *, seed: int = 0) -> dict[str, str]:
    """All that a run left and that does not depend on time, exact to the last bit.

    Metrics, and everything in the last checkpoint: parameters, optimizer, tracker, branch point,
    averages, random states, each with its memory layout.
    """
    run = study.run(seed, branch)
    newest = latest_checkpoint(run.checkpoints)
    assert newest is not None
    checkpoint = load_checkpoint(newest)
    tensors = {
        f"tensor {name}": f"{tensor.stride()} {tensor.dtype} {tensor.tolist()}"
        for name, tensor in checkpoint.tensors.items()
    }
    metrics = {
        f"column {name}": repr(values) for name, values in run.read_metrics().to_pydict().items()
    }
    return {"step": newest.name, "state": repr(checkpoint.state), **tensors, **metrics}


def differing(one: dict[str, str], other: dict[str, str]) -> list[str]:
    """The names of what differs between two of `left`."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
