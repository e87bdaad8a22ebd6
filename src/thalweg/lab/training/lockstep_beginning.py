"""Can these runs share a computation, by which way, and where do they go on from?

What a spec says of that is asked before (`lab/execution/lockstep.py`); here data and models are
there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from thalweg.errors import InvalidInput, ThalwegError, invalid
from thalweg.lab.store.checkpoint import list_checkpoints, load_checkpoint, verify_checkpoint
from thalweg.lab.training.building import make_objective
from thalweg.lab.training.lockstep_members import Member
from thalweg.lab.training.loop import Run
from thalweg.lab.training.run_state import LOCKSTEP, restored_state
from thalweg.loss.guards.determinism import mode_dependent_layers
from thalweg.loss.lockstep_objective import LockstepObjective

EVERY_CHUNK = 10**9
"""More samples than a chunk has."""
TRIED_SAMPLES, TRIED_VECTORS = 2, 4
SAME_LOSS = 1e-3
"""Relative difference of a loss in training mode from the one whose curvature is known."""


def name_of(run: Run) -> str:
    """The name of a run among those of several studies."""
    return f"{run.study.path.name}/seed-{run.seed}/{run.branch}"


def check_alike(runs: Sequence[Run]) -> None:
    """Refuse runs that do not have the same data, model and k.

    Raises:
        InvalidInput: see above; a model that trains otherwise than its curvature is known.
    """
    first = runs[0].setup
    for run in runs:
        setup = run.setup
        if layers := mode_dependent_layers(setup.problem.model):
            raise invalid("lockstep", f"layer {layers[0][0]}, which {layers[0][2]}", "none such")
        if setup.k != first.k:
            raise invalid("lockstep", f"k = {setup.k} and {first.k}", "one k")
        buffers = zip(setup.problem.model.buffers(), first.problem.model.buffers(), strict=True)
        tensors = zip(setup.problem.train, first.problem.train, strict=True)
        if not all(torch.equal(*pair) for pair in (*buffers, *tensors)):
            raise invalid("lockstep", "data or buffers that differ between the seeds", "the same")


def lockstep_objective(run: Run, count: int) -> LockstepObjective:
    """The losses of so many runs, the fastest way that the model has: found by trying.

    Raises:
        InvalidInput: the model cannot be shared, see `LockstepObjective`.
    """
    objective = make_objective(run.spec, run.setup.problem)
    recorded = [(True, EVERY_CHUNK)] if objective.device.type == "cuda" else []
    failed: Exception | None = None
    for replay, largest in (*recorded, (False, EVERY_CHUNK), (False, 0)):
        runs = LockstepObjective(objective, vectorize_up_to=largest, replay=replay)
        try:
            _try(runs, run, count)
            return runs
        # What cannot be captured as a CUDA graph is torch's own error.
        except (InvalidInput, RuntimeError) as error:
            failed = error
    what = str(failed).splitlines()[0]
    raise invalid("lockstep", f"a model of which torch says: {what}", "one that has vmap")


def _try(runs: LockstepObjective, run: Run, count: int) -> None:
    problem, objective = run.setup.problem, runs.objective
    samples = torch.arange(min(TRIED_SAMPLES, problem.num_samples), device=objective.device)
    thetas = objective.theta().repeat(count, 1)
    losses, gradients = runs.values_and_gradients(thetas, samples.repeat(count, 1))
    runs.hessian_products(thetas, gradients.unsqueeze(1).repeat(1, TRIED_VECTORS, 1), samples)
    before = [buffer.clone() for buffer in problem.model.buffers()]
    inputs, targets = (part[samples] for part in problem.train)
    with torch.no_grad():
        trained = float(problem.loss(problem.model(inputs), targets))
    after = list(problem.model.buffers())
    known = float(losses[0])
    same = abs(trained - known) <= SAME_LOSS * abs(known) or trained != trained
    if not same or not all(map(torch.equal, before, after)):
        raise invalid("lockstep", "a model that trains otherwise than it is evaluated", "one loss")


def common_checkpoints(
    members: Iterable[Member],
) -> tuple[dict[str, Mapping[str, Any]], dict[int, Path]]:
    """The newest checkpoints of one lockstep and step that all have; empty where there are none.

    Returns:
        What they say of the lockstep, by name of the run, and where they are, by place.
    """
    found: list[dict[tuple[str, int], tuple[Path, Mapping[str, Any]]]] = []
    here = list(members)
    for member in here:
        known: dict[tuple[str, int], tuple[Path, Mapping[str, Any]]] = {}
        for path in list_checkpoints(member.run.folder.checkpoints):
            record = _record(path, member.run)
            if record is not None and name_of(member.run) in record["names"]:
                known[record["group"], record["tick"]] = path, record
        found.append(known)
    shared = set.intersection(*map(set, found)) if found else set()
    if not shared:
        return {}, {}
    # By steps: of an earlier lockstep more ticks may be known.
    newest = max(shared, key=lambda moment: found[0][moment][0].name)
    records = {name_of(m.run): known[newest][1] for m, known in zip(here, found, strict=True)}
    starts = {m.place: known[newest][0] for m, known in zip(here, found, strict=True)}
    return records, starts


def _record(path: Path, run: Run) -> Mapping[str, Any] | None:
    """What a checkpoint says of the lockstep that saved it; None where none did, or it is bad."""
    try:
        verify_checkpoint(path, run.hash)
        state = restored_state(load_checkpoint(path), run.setup.objective.device)
    except ThalwegError:
        return None
    return state["source"].get(LOCKSTEP)
