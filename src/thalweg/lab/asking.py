"""Which branches need S_k where they start, and which runs find it for them at their end?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from thalweg.lab.config import TRUNK

if TYPE_CHECKING:
    from thalweg.lab.config import PhaseSpec, Spec

AT_BRANCH_POINT = ("displacement", "overlap")
"""Probes that compare with theta and S_k at the branch point."""


def needs_branch_point(spec: Spec, phase: PhaseSpec) -> bool:
    """Whether a branch asks for S_k where it starts."""
    is_frozen = phase.split is not None and phase.split.basis == "frozen"
    return is_frozen or not spec.probes.keys().isdisjoint(AT_BRANCH_POINT)


def branches_take_point_over(spec: Spec, name: str) -> bool:
    """Whether a branch that starts at the end of this run (a branch or the trunk) takes its S_k.

    A branch does where it asks for that S_k; one with a subspace of its own finds that for itself.
    """
    return any(
        _takes_point_over(spec, other)
        for other, branch in spec.branches.items()
        if (branch.after or TRUNK) == name
    )


def _takes_point_over(spec: Spec, branch: str) -> bool:
    own, before = spec.of_branch(branch), spec.of_branch(spec.branches[branch].after or TRUNK)
    same = own.subspace == before.subspace
    return same and needs_branch_point(own, spec.branch_phase(branch))
