"""How long will a study take, and how much disk? From measured steps, said before time is spent."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

from thalweg.lab.asking import (
    asks_for_subspace,
    branches_take_point_over,
    gradients_a_step,
    in_own_metric,
    samples_of_hessian,
    takes_point_over,
    updates_a_step,
)
from thalweg.lab.measuring import Measurement
from thalweg.lab.run_names import TRUNK
from thalweg.lab.schedule import Task
from thalweg.lab.spec import PhaseSpec, Spec
from thalweg.lab.store import estimate_disk
from thalweg.lab.store.status import Status

BLOCKS = 8
"""Blocks (P, k) in a tracker's state: two references of three, basis, the basis before."""
START_SECONDS = 0.5
"""From starting a process to its first line."""
RATE_SECONDS, RATE_STEPS = 2.0, 20
"""A run's own rate counts once it has gone on for so long: its first solve is no step."""


def seconds_of(spec: Spec, task: Task, costs: Measurement, *, settled: bool = False) -> float:
    """How long a run takes up to the bounds of its phases.

    Args:
        settled: whether moving the subspace on costs what it does in the long run, or at first.
    """
    phases = task.phases(spec)
    solves = int(branches_take_point_over(spec, task.branch))
    if not (task.branch in spec.branches and takes_point_over(spec, task.branch)):
        solves += int(asks_for_subspace(spec, task.branch, costs.subspace_probes))
    spec = spec.of_branch(task.branch)
    total = sum(
        p.most_steps(costs.num_samples) * _per_step(spec, p, costs, settled=settled) for p in phases
    )
    return total + START_SECONDS + costs.start + solves * costs.subspace.begin


def longest_first(spec: Spec, tasks: Sequence[Task], costs: Measurement) -> list[Task]:
    """The tasks by the time to the end of all that waits for them: cores stay busy to the end."""
    path: dict[Task, float] = {}
    following = {task: [t for t in tasks if t.needs == task] for task in tasks}

    def seconds(task: Task) -> float:
        if task not in path:
            after = max(map(seconds, following[task]), default=0.0)
            path[task] = seconds_of(spec, task, costs) + after
        return path[task]

    return sorted(tasks, key=lambda task: -seconds(task))


def makespan(durations: Mapping[Task, float], workers: int) -> float:
    """When the last task is done, each begun in order as soon as a worker and its trunk are."""
    free = [0.0] * max(1, workers)
    done: dict[Task, float] = {}
    for task in sorted(durations, key=lambda task: task.branch != TRUNK):
        ready = done.get(task.needs, 0.0) if task.needs else 0.0
        done[task] = max(heapq.heappop(free), ready) + durations[task]
        heapq.heappush(free, done[task])
    return max(done.values(), default=0.0)


def time_left(
    spec: Spec,
    statuses: Mapping[Task, Status | None],
    workers: int,
    costs: Measurement | None,
) -> float | None:
    """Seconds until all tasks are done; None while nothing is known.

    A run that is under way goes on at its own rate. For the others, rates are those of the same
    branch in other seeds, or as measured beforehand, times how far the measurement was off so far.
    """
    rates: dict[str, list[float]] = {}
    left: dict[Task, int] = {}
    own: dict[Task, float] = {}
    for task, status in statuses.items():
        made, total = _steps(spec, task, status, costs)
        enough = made >= max(1, min(RATE_STEPS, total // 4))
        if status is not None and enough and status.seconds >= RATE_SECONDS:
            own[task] = status.seconds / made
            rates.setdefault(task.branch, []).append(own[task])
        ended = status is not None and status.state in ("done", "diverged", "failed")
        if not ended:
            left[task] = max(0, total - made)
    durations: dict[Task, float] = {}
    off = _off_by(spec, own, costs)
    for task, steps in left.items():
        known = rates.get(task.branch)
        if task in own:
            durations[task] = steps * own[task]
        elif known:
            durations[task] = steps * sum(known) / len(known)
        elif costs is not None:
            total = max(1, _total(spec, task, costs))
            durations[task] = off * seconds_of(spec, task, costs) * steps / total
        elif rates:
            every = [rate for found in rates.values() for rate in found]
            durations[task] = steps * sum(every) / len(every)
        else:
            return None
    return makespan(durations, workers)


def disk_of(spec: Spec, tasks: Sequence[Task], costs: Measurement) -> int:
    """Bytes that the runs of these tasks leave, from above."""
    # A branch point is a vector and a basis more; what is found for branches is a tracker more.
    vectors = costs.optimizer_vectors + 1 + (0 if spec.subspace.source == "random" else 1)
    total = 0
    for task in tasks:
        steps, probes = _total(spec, task, costs), spec.of_branch(task.branch).probes
        sources = [phase.split.source for phase in task.phases(spec) if phase.split is not None]
        window = max((s.window + s.k for s in sources if s is not None), default=0)
        regular = steps // spec.checkpoint.every_steps + 1
        total += estimate_disk(
            costs.num_parameters,
            costs.k,
            vectors + window,
            spec.checkpoint.keep + 1 + int(branches_take_point_over(spec, task.branch)),
            steps // min(probes.values(), default=steps) + 2,
            4 * len(probes) + 5 * costs.k,
            regular if spec.checkpoint.save_bases else 0,
            bases_per_checkpoint=BLOCKS + 1,
            bytes_per_number=8 if spec.dtype == "float64" else 4,
        )
    return total


def _per_step(spec: Spec, phase: PhaseSpec, costs: Measurement, *, settled: bool) -> float:
    """A step of a phase: the optimizer's, and the subspace and the gradient when asked for."""
    gradients = gradients_a_step(spec, phase, costs.gradient_probes)
    updates = updates_a_step(spec, phase, costs.subspace_probes)
    subspace = _subspace_seconds(spec, phase, costs, settled=settled)
    seconds = costs.step + gradients * costs.gradient + updates * subspace
    if phase.local is not None:
        seconds += (phase.local.workers - 1) * costs.step
    if phase.batch_size == "all":
        seconds += costs.gradient
    if in_own_metric(phase):
        seconds += costs.subspace.begin
    if "test" in spec.probes:
        seconds += costs.test / spec.probes["test"]
    if "solved_eigenvalues" in spec.probes:
        seconds += costs.subspace.solve / spec.probes["solved_eigenvalues"]
    own = sum(costs.probes.get(name, 0.0) / every for name, every in spec.probes.items())
    return seconds + own


def _subspace_seconds(spec: Spec, phase: PhaseSpec, costs: Measurement, *, settled: bool) -> float:
    """Moving the subspace on by one step."""
    source, every = spec.subspace.source, spec.subspace.every
    if source == "random":
        return 0.0
    if source == "tracker":
        return (costs.subspace.settled if settled else costs.subspace.tracked) / every
    # A solve takes as many products over few samples as over all.
    solved = samples_of_hessian(spec, phase, costs.num_samples)
    share = solved / costs.subspace.samples if costs.subspace.samples else 1.0
    return share * costs.subspace.begin / every


def _total(spec: Spec, task: Task, costs: Measurement | None) -> int:
    """The most steps of a run; those counted in epochs are known once the data is."""
    phases = task.phases(spec)
    if costs is not None:
        return sum(phase.most_steps(costs.num_samples) for phase in phases)
    return sum(phase.steps or 0 for phase in phases)


def _steps(
    spec: Spec, task: Task, status: Status | None, costs: Measurement | None
) -> tuple[int, int]:
    """Steps a run has made, and will have made at the most."""
    total = _total(spec, task, costs)
    if status is None:
        return 0, total
    if task.branch == TRUNK:
        return min(status.step, total), total
    if status.end_step is None:
        return 0, total
    return max(0, min(status.step - (status.end_step - total), total)), total


def _off_by(spec: Spec, own: Mapping[Task, float], costs: Measurement | None) -> float:
    """How many times longer the runs so far took than was measured."""
    if costs is None or not own:
        return 1.0
    expected = sum(
        seconds_of(spec, task, costs) / max(1, _total(spec, task, costs)) for task in own
    )
    return sum(own.values()) / expected if expected > 0 else 1.0
