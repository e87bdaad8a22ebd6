"""What is measured at a step of training: state, probes, `watch`."""

from __future__ import annotations

import warnings
from typing import Any

from thalweg.measure.batch_curvature import BatchSharpness, batch_sharpness
from thalweg.measure.preconditioning import preconditioned_sharpness
from thalweg.measure.probes import Probe, probe
from thalweg.measure.step_state import BranchPoint, StepState
from thalweg.measure.watcher import Watcher, WatchWarning
from thalweg.measure.watching import watch

__all__ = [
    "BatchSharpness",
    "BranchPoint",
    "Probe",
    "StepState",
    "WatchWarning",
    "Watcher",
    "batch_sharpness",
    "preconditioned_sharpness",
    "probe",
    "watch",
]


def __getattr__(name: str) -> Any:
    if name == "Moment":
        hint = "thalweg.measure.Moment is now called StepState"
        warnings.warn(hint, DeprecationWarning, stacklevel=2)
        return StepState
    raise AttributeError(f"module 'thalweg.measure' has no attribute {name!r}")
