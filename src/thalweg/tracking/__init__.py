"""The top eigenspace from one training step to the next: tracked, solved, frozen, baselines."""

from __future__ import annotations

from thalweg.tracking.batch_subspace import BatchSubspace
from thalweg.tracking.block_subspace import BlockSubspace, principal_directions
from thalweg.tracking.gradient_subspaces import GradientSubspace, UpdateSubspace
from thalweg.tracking.lockstep_tracker import LockstepTracker
from thalweg.tracking.optimizer_metric import OptimizerMetricSource
from thalweg.tracking.preconditioner import preconditioner
from thalweg.tracking.source import (
    FixedSubspace,
    Split,
    SubspaceSource,
    TargetMissed,
    TrackerReport,
)
from thalweg.tracking.threshold_source import ThresholdSource
from thalweg.tracking.tracker import SubspaceTracker

__all__ = [
    "BatchSubspace",
    "BlockSubspace",
    "FixedSubspace",
    "GradientSubspace",
    "LockstepTracker",
    "OptimizerMetricSource",
    "Split",
    "SubspaceSource",
    "SubspaceTracker",
    "TargetMissed",
    "ThresholdSource",
    "TrackerReport",
    "UpdateSubspace",
    "preconditioner",
    "principal_directions",
]
