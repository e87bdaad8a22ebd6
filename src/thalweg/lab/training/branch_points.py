"""Where does a branch start? At theta and S_k of its branch point.

The run that ends there finds S_k once, as each branch would for itself, to the last bit; a branch
with a subspace of its own finds that one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from thalweg.lab.config import Spec
from thalweg.lab.training.building import Setup, make_source
from thalweg.measure.step_state import BranchPoint
from thalweg.tracking.source import SubspaceSource
from thalweg.tracking.tracker import SubspaceTracker


def found_for_branches(spec: Spec, branch: str, setup: Setup, seed: int) -> dict[str, Any]:
    """A tracker's state at the end of a run, for those that start there; empty where none asks.

    Args:
        spec: of the whole study.
        branch: the run that ends, at the model's parameters.
    """
    if not spec.hands_over_branch_point(branch):
        return {}
    own = spec.of_branch(branch)
    source = make_source(own, setup, seed)
    # What is followed alone: the Hessian of a mini-batch is another one for each branch.
    if not isinstance(source, SubspaceTracker):
        return {}
    source.update(setup.objective.theta())
    return {"by": _settings(own), "source": source.state_dict()}


def at_branch_point(
    found: Mapping[str, Any], spec: Spec, source: SubspaceSource, theta: Tensor
) -> BranchPoint:
    """The branch point at theta (P,), with S_k as found there, or else found now.

    Args:
        found: what `found_for_branches` gave.
        spec: as the branch computes with it.
        source: of the branch; it goes on from there.
    """
    if found and found["by"] == _settings(spec):
        source.load_state_dict(found["source"])
        return BranchPoint(theta, source.subspace)
    return BranchPoint(theta, source.update(theta))


def _settings(spec: Spec) -> dict[str, Any]:
    return spec.subspace.model_dump(mode="json")
