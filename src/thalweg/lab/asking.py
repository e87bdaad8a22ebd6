"""What does a run ask for, and how often: the full gradient, the subspace?

Nothing is computed that no probe, rule or split asks for; so nothing else is measured beforehand,
or counted in an estimate.
"""

from __future__ import annotations

from collections.abc import Container
from typing import TYPE_CHECKING

from thalweg.lab.run_names import TRUNK

if TYPE_CHECKING:
    from thalweg.lab.spec import PhaseSpec, Spec

AT_BRANCH_POINT = ("displacement", "overlap")
"""Probes that compare with theta and S_k at the branch point."""


def share_of_steps(spec: Spec, probes: Container[str]) -> float:
    """At which share of the steps one of these probes is due, by the one that is due most often."""
    return max((1 / every for name, every in spec.probes.items() if name in probes), default=0.0)


def gradients_a_step(spec: Spec, phase: PhaseSpec, probes: Container[str]) -> float:
    """How many full gradients a step of a phase asks for, beside the optimizer's own.

    Args:
        probes: those that ask for one.
    """
    by_rule = phase.until_alignment is not None or phase.until_loss is not None
    return 1.0 if by_rule or phase.noise is not None else share_of_steps(spec, probes)


def updates_a_step(spec: Spec, phase: PhaseSpec, probes: Container[str]) -> float:
    """How often the subspace moves on, in updates a step of a phase.

    Args:
        probes: those that ask for the subspace.
    """
    follows = _has_live_split(phase) and not in_own_metric(phase)
    in_noise = phase.noise is not None and phase.noise.part != "all"
    if phase.until_alignment is not None or in_noise or follows:
        return 1.0
    return share_of_steps(spec, probes)


def samples_of_hessian(spec: Spec, phase: PhaseSpec, num_samples: int) -> int:
    """How many samples the loss has whose S_k it is: as given, those of a mini-batch, or all N."""
    given = spec.subspace.samples
    size = phase.batch_size if given == "batch" else given
    return num_samples if size is None or size == "all" else size


def in_own_metric(phase: PhaseSpec) -> bool:
    """Whether updates are split on a live subspace in the metric of the optimizer."""
    return _has_live_split(phase) and phase.split is not None and phase.split.metric == "optimizer"


def needs_branch_point(spec: Spec, phase: PhaseSpec) -> bool:
    """Whether a branch asks for S_k where it starts."""
    is_frozen = phase.split is not None and phase.split.basis == "frozen"
    return is_frozen or not spec.probes.keys().isdisjoint(AT_BRANCH_POINT)


def takes_point_over(spec: Spec, branch: str) -> bool:
    """Whether a branch takes S_k where it starts from the run that ends there.

    It does where it asks for that one; a branch with a subspace of its own finds that for itself.
    """
    own, before = spec.of_branch(branch), spec.of_branch(spec.branches[branch].after or TRUNK)
    same = own.subspace == before.subspace
    return same and needs_branch_point(own, spec.branch_phase(branch))


def branches_take_point_over(spec: Spec, name: str) -> bool:
    """Whether a branch that starts at the end of this run, a branch's or the trunk's, does."""
    return any(
        takes_point_over(spec, other)
        for other, branch in spec.branches.items()
        if (branch.after or TRUNK) == name
    )


def asks_for_subspace(spec: Spec, branch: str, probes: Container[str]) -> bool:
    """Whether anything in a branch, or in the trunk, asks for the subspace.

    Args:
        probes: those that do.
    """
    is_branch, spec = branch in spec.branches, spec.of_branch(branch)
    phases = (spec.branch_phase(branch),) if is_branch else spec.phases
    return any(
        updates_a_step(spec, phase, probes) > 0
        or in_own_metric(phase)
        or (is_branch and needs_branch_point(spec, phase))
        for phase in phases
    )


def _has_live_split(phase: PhaseSpec) -> bool:
    split = phase.split
    if split is None or not split.changes:
        return False
    return split.basis == "live" and split.source is None
