"""What does a run compute with? Problem, full loss, k, subspace and optimizer, from spec and seed.

The same things are built once before a study, so that what cannot be built is found out before
any run begins.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from thalweg.contrib.simulated_workers import SimulatedWorkers
from thalweg.errors import InvalidInput, invalid
from thalweg.lab.store.parameters import load_parameters
from thalweg.loss.objective import Objective
from thalweg.loss.reduce import group_of_all
from thalweg.operators.hessian import Hessian
from thalweg.optim.split import SplitUpdate
from thalweg.optim.stability import edge_of_stability, stability_threshold
from thalweg.problems import Problem, build_problem
from thalweg.spectrum.eigensolver import top_eigenpairs
from thalweg.spectrum.gap import widest_gap
from thalweg.spectrum.subspace import Subspace, random_subspace
from thalweg.tracking.baselines import NextEigenspace
from thalweg.tracking.batch_subspace import BatchSubspace
from thalweg.tracking.gradient_subspaces import GradientSubspace, UpdateSubspace
from thalweg.tracking.optimizer_metric import OptimizerMetricSource
from thalweg.tracking.source import FixedSubspace, SubspaceSource
from thalweg.tracking.threshold_source import ThresholdSource
from thalweg.tracking.tracker import SubspaceTracker

if TYPE_CHECKING:
    from thalweg.lab.config import PhaseSpec, Spec
    from thalweg.lab.config.optimizers import OptimizerSettings
    from thalweg.lab.config.phases import SplitSourceSpec

GAP_CANDIDATES = 21


@dataclass(frozen=True)
class Setup:
    """The problem at its initial parameters, its full training loss, and k."""

    problem: Problem
    objective: Objective
    k: int


def stream_seed(purpose: str, *numbers: int) -> int:
    """A seed below 2^63 for one purpose, from whole numbers such as the run's seed.

    Order of the data, dropout and the tracker's samples each have a stream, so that what one part
    draws never changes another part's numbers.
    """
    words = " ".join((purpose, *map(str, numbers)))
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "big") >> 1


def build_setup(spec: Spec, seed: int, device: str) -> Setup:
    """Build what a run of this seed computes with, with the spec's own parameters where it has any.

    Raises:
        InvalidInput: data or parameters that cannot be used, no k, k > P.
        IntegrityError: a damaged file.
    """
    problem = build_problem(spec.problem, seed, getattr(torch, spec.dtype), device)
    if spec.initial_checkpoint is not None:
        _load_initial_parameters(problem, spec.initial_checkpoint)
    for phase in (*spec.phases, *map(spec.branch_phase, spec.branches)):
        _check_batch(phase, problem)
    objective = make_objective(spec, problem)
    return Setup(problem, objective, number_of_directions(spec, problem, objective))


def make_objective(spec: Spec, problem: Problem, samples: Tensor | None = None) -> Objective:
    """The full training loss of a problem, or that of some samples (n,) int64.

    Processes that share a run have each a part of the samples, in their order.
    """
    inputs, targets = problem.train
    group = group_of_all()
    if group is not None:
        every = torch.arange(len(inputs)) if samples is None else samples
        parts = every.tensor_split(dist.get_world_size(group))
        samples = parts[dist.get_rank(group)].to(inputs.device)
    return Objective(
        problem.model,
        problem.loss,
        (inputs, targets) if samples is None else (inputs[samples], targets[samples]),
        chunk_size=spec.problem.chunk_size or "auto",
        # The model trains as it is; curvature is that of the function it stands for.
        mode="eval",
        vectorize_up_to=spec.problem.vectorize_up_to,
        group=group,
    )


def number_of_directions(spec: Spec, problem: Problem, objective: Objective) -> int:
    """k: as given, the number of classes, or where the spectrum has its widest gap.

    The gap is that of the initial parameters' Hessian, the same for all runs of a seed.

    Raises:
        InvalidInput: the problem has no classes, so k must be given; k > P.
    """
    k = spec.subspace.k
    if k == "gap":
        return widest_gap(top_eigenvalues(objective, GAP_CANDIDATES))
    if k == "classes":
        if problem.num_classes is None:
            raise InvalidInput(
                "subspace.k: 'classes' was asked for, but the problem has none; give a number, or"
                " 'gap'"
            )
        k = problem.num_classes
    if k > objective.num_parameters:
        allowed = f"at most the number of parameters, {objective.num_parameters}"
        raise invalid("subspace.k", k, allowed)
    return k


def top_eigenvalues(objective: Objective, count: int) -> Tensor:
    """The top eigenvalues at the model's current parameters, at most P of them."""
    hessian = Hessian(objective, keep_graph=True)
    count = min(count, objective.num_parameters)
    return top_eigenpairs(hessian, count, check_repeated=0).eigenvalues


def make_source(spec: Spec, setup: Setup, seed: int) -> SubspaceSource:
    """What gives the run its subspace at each step: a tracker, or a baseline.

    A `BatchSubspace` waits for the samples of each step.
    """
    settings, objective = spec.subspace, setup.objective
    own_seed = stream_seed("subspace", settings.seed, seed)
    if settings.samples == "batch":
        return BatchSubspace(
            objective,
            setup.k,
            tolerance=settings.tolerance,
            every=settings.every,
            seed=own_seed,
        )
    if settings.samples is not None:
        objective = make_objective(spec, setup.problem, _drawn(settings.samples, setup, own_seed))
    if settings.source == "random":
        drawn = random_subspace(objective.num_parameters, setup.k, own_seed, dtype=objective.dtype)
        return FixedSubspace(drawn.to(objective.device))
    if settings.source == "next":
        return NextEigenspace(
            objective, setup.k, tolerance=settings.tolerance, every=settings.every
        )
    if settings.source == "threshold":
        return _threshold_source(spec, setup, seed)
    return SubspaceTracker(objective, setup.k, **_tracking(spec, seed))


def _threshold_source(
    spec: Spec, setup: Setup, seed: int, optimizer: Optimizer | None = None
) -> ThresholdSource:
    """A split at the spec's curvature; in the metric of an optimizer, if one is given."""
    settings = spec.subspace
    return ThresholdSource(
        setup.objective,
        settings.tau,
        relative=settings.relative_to in (None, "sharpness"),
        optimizer=optimizer,
        error=settings.error,
        seed=stream_seed("subspace", settings.seed, seed),
    )


def _tracking(spec: Spec, seed: int) -> dict[str, Any]:
    """How closely a subspace is followed, in whichever metric."""
    settings = spec.subspace
    return {
        "error": settings.error,
        "bulk_error": settings.bulk_error,
        "exact": settings.source == "exact",
        "every": settings.every,
        "tolerance": settings.tolerance,
        "seed": stream_seed("subspace", settings.seed, seed),
    }


def _drawn(count: int, setup: Setup, seed: int) -> Tensor:
    """Numbers of some training samples, in order (count,).

    Raises:
        InvalidInput: there are not so many.
    """
    total = setup.problem.num_samples
    if count > total:
        allowed = f"at most the number of training samples, {total}"
        raise invalid("subspace.samples", count, allowed)
    generator = torch.Generator().manual_seed(stream_seed("samples of the Hessian", seed))
    chosen = torch.randperm(total, generator=generator)[:count].sort().values
    return chosen.to(setup.objective.device)


def solved_subspace(spec: Spec, setup: Setup, seed: int, theta: Tensor) -> Subspace:
    """The run's kind of subspace at theta (P,), from scratch: no tracker's state is touched."""
    if spec.subspace.source in ("random", "next"):
        return make_source(spec, setup, seed).update(theta)
    return solve(setup.objective, theta, setup.k, spec.subspace.tolerance)


def solve(objective: Objective, theta: Tensor, k: int, tolerance: float) -> Subspace:
    """The top k eigenpairs at theta (P,) from scratch, at most P of them."""
    hessian = Hessian(objective, theta, keep_graph=True)
    k = min(k, objective.num_parameters)
    return top_eigenpairs(hessian, k, tolerance=tolerance, check_repeated=0)


def make_optimizer(
    spec: Spec,
    phase: PhaseSpec,
    setup: Setup,
    seed: int,
    source: SubspaceSource,
    at_branch_point: Subspace | None = None,
) -> Optimizer:
    """The phase's optimizer over all trainable parameters, wrapped where updates are split.

    Args:
        source: what the split follows, unless it is frozen or in the optimizer's metric.
        at_branch_point: S_k there, for a frozen split.
    """
    model = setup.problem.model
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if phase.local is not None:
        return _make_workers(phase, named, setup.problem.num_samples)
    optimizer = phase.optimizer.build(named)
    if phase.split is None or not phase.split.changes:
        return optimizer
    frozen = phase.split.basis == "frozen"
    if phase.split.source is not None:
        source = _cheap_source(phase.split.source, spec, setup, seed)
    elif phase.split.metric == "optimizer" and spec.subspace.source == "threshold":
        source = _threshold_source(spec, setup, seed, optimizer)
    elif phase.split.metric == "optimizer":
        source = OptimizerMetricSource(
            setup.objective, setup.k, optimizer, frozen=frozen, **_tracking(spec, seed)
        )
    elif frozen:
        assert at_branch_point is not None
        source = FixedSubspace(at_branch_point)
    if isinstance(source, ThresholdSource) and spec.subspace.relative_to == "edge":
        _split_at_the_edge(source, optimizer, spec.subspace.tau)
    return SplitUpdate(
        optimizer,
        source,
        phase.split.dominant,
        phase.split.bulk,
        parameters=setup.objective.layout.parameters(model),
    )


def _split_at_the_edge(source: ThresholdSource, optimizer: Optimizer, multiple: float) -> None:
    """Let a source split at a multiple of the optimizer's stability threshold.

    Raises:
        InvalidInput: there is no threshold, or it is one in another metric than the split's.
    """
    is_preconditioned = stability_threshold(optimizer).preconditioned
    if is_preconditioned != (source.optimizer is not None):
        name = type(optimizer).__name__
        metric = "optimizer" if is_preconditioned else "euclidean"
        raise invalid("split.metric", f"another one for {name}", f"{metric!r}, that of its edge")
    source.ask(edge_of_stability(optimizer, multiple))


def _make_workers(
    phase: PhaseSpec, named: list[tuple[str, nn.Parameter]], num_samples: int
) -> SimulatedWorkers:
    """The phase's optimizer over these parameters, once for each of its workers."""
    assert phase.local is not None
    optimizers = [phase.optimizer.build(named) for _ in range(phase.local.workers)]
    schedule = phase.local.schedule(phase.warmup_steps)
    return SimulatedWorkers(optimizers, schedule, phase.most_steps(num_samples))


def _cheap_source(
    settings: SplitSourceSpec, spec: Spec, setup: Setup, seed: int
) -> UpdateSubspace | GradientSubspace:
    layout = setup.objective.layout
    blocks = layout.sizes if settings.blocks == "tensor" else (layout.num_parameters,)
    common = {"every": settings.every, "blocks": blocks, "centered": settings.centered}
    if settings.name == "updates":
        return UpdateSubspace(settings.k, window=settings.window, **common)
    own_seed = stream_seed("gradients of the split", spec.subspace.seed, seed)
    return GradientSubspace(
        setup.objective, settings.k, samples=settings.window, seed=own_seed, **common
    )


def can_carry_state(before: OptimizerSettings, after: OptimizerSettings) -> bool:
    """Whether an optimizer can take another's state: of the same kind, which keeps the same."""

    def kept(settings: OptimizerSettings) -> dict[str, bool]:
        values = settings.model_dump()
        return {
            key: bool(value)
            for key, value in values.items()
            if isinstance(value, bool) or key == "momentum"
        }

    def kinds(settings: OptimizerSettings) -> tuple[type, type, str]:
        companion = type(getattr(settings, "companion", None))
        return type(settings), companion, getattr(settings, "source", "")

    # Blocks with rates are groups, and a state is kept by the place of its tensor in the groups.
    same_groups = set(before.block_rates or ()) == set(after.block_rates or ())
    return kinds(before) == kinds(after) and kept(before) == kept(after) and same_groups


def _load_initial_parameters(problem: Problem, path: str) -> None:
    given = load_parameters(path)
    try:
        problem.model.load_state_dict(given)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise InvalidInput(f"initial_checkpoint {path}: {reason}") from None


def _check_batch(phase: PhaseSpec, problem: Problem) -> None:
    total = problem.num_samples
    if phase.batch_size != "all" and phase.batch_size > total:
        allowed = f"at most the number of training samples, {total}, or 'all'"
        raise invalid(f"batch_size of phase {phase.name!r}", phase.batch_size, allowed)
    if phase.noise is not None and phase.noise.batch_size > total:
        allowed = f"at most the number of training samples, {total}"
        name = f"noise.batch_size of phase {phase.name!r}"
        raise invalid(name, phase.noise.batch_size, allowed)
