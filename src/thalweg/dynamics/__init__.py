"""What is measured along a training trajectory."""

from __future__ import annotations

# Imported for the probes that they register.
import thalweg.dynamics.batch_probes
import thalweg.dynamics.stability_probes  # noqa: F401
from thalweg.dynamics.batch_curvature import BatchSharpness, batch_sharpness
from thalweg.dynamics.moment import BranchPoint, Moment
from thalweg.dynamics.optimizer_metric import OptimizerMetricSource
from thalweg.dynamics.preconditioning import preconditioned_sharpness, preconditioner
from thalweg.dynamics.probes import PROBES, Probe, probe
from thalweg.dynamics.stability import (
    StabilityThreshold,
    sam_threshold,
    stability_threshold,
)
from thalweg.dynamics.watcher import Watcher, WatchWarning
from thalweg.dynamics.watching import watch

__all__ = [
    "PROBES",
    "BatchSharpness",
    "BranchPoint",
    "Moment",
    "OptimizerMetricSource",
    "Probe",
    "StabilityThreshold",
    "WatchWarning",
    "Watcher",
    "batch_sharpness",
    "preconditioned_sharpness",
    "preconditioner",
    "probe",
    "sam_threshold",
    "stability_threshold",
    "watch",
]
