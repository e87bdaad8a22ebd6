"""What is measured at a step of training: state, probes, `watch`."""

from __future__ import annotations

from thalweg.measure.batch_curvature import BatchSharpness, batch_sharpness
from thalweg.measure.preconditioning import preconditioned_sharpness
from thalweg.measure.probes import Probe, probe
from thalweg.measure.step_state import BranchPoint, Moment
from thalweg.measure.watcher import Watcher, WatchWarning
from thalweg.measure.watching import watch

__all__ = [
    "BatchSharpness",
    "BranchPoint",
    "Moment",
    "Probe",
    "WatchWarning",
    "Watcher",
    "batch_sharpness",
    "preconditioned_sharpness",
    "probe",
    "watch",
]
