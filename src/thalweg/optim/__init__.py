"""Optimizers that split or steer an update, and the sharpness at which they become unstable."""

from __future__ import annotations

from thalweg.optim.combined import Combined
from thalweg.optim.lockstep_sgd import LockstepSGD
from thalweg.optim.sam import SAM
from thalweg.optim.split import SplitUpdate
from thalweg.optim.stability import (
    StabilityThreshold,
    edge_of_stability,
    sam_threshold,
    stability_threshold,
)
from thalweg.tracking.wrapping import needs_closure

__all__ = [
    "SAM",
    "Combined",
    "LockstepSGD",
    "SplitUpdate",
    "StabilityThreshold",
    "edge_of_stability",
    "needs_closure",
    "sam_threshold",
    "stability_threshold",
]
