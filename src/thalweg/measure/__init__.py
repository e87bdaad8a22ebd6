"""What is measured at a step of training: its state, probes, `watch`, and where rows go."""

from __future__ import annotations

import warnings
from typing import Any

from thalweg.measure.alarm import Alarm
from thalweg.measure.batch_sharpness import BatchSharpness, batch_sharpness
from thalweg.measure.critical_sharpness import (
    CriticalSharpness,
    critical_sharpness,
    critical_sharpness_along,
)
from thalweg.measure.diagnosis import Diagnosis, Finding, diagnose
from thalweg.measure.directional_sharpness import directional_sharpness
from thalweg.measure.gradient_noise_scale import GradientNoiseScale, gradient_noise_scale
from thalweg.measure.preconditioned_sharpness import preconditioned_sharpness
from thalweg.measure.probes import Probe, probe
from thalweg.measure.sharpness_by_block import sharpness_by_block
from thalweg.measure.sinks import CSV, Console, History, Sink, Sinks, WatchWarning
from thalweg.measure.step_state import BranchPoint, StepState
from thalweg.measure.watch import watch, watch_loss
from thalweg.measure.watcher import Watcher

__all__ = [
    "CSV",
    "Alarm",
    "BatchSharpness",
    "BranchPoint",
    "Console",
    "CriticalSharpness",
    "Diagnosis",
    "Finding",
    "GradientNoiseScale",
    "History",
    "Probe",
    "Sink",
    "Sinks",
    "StepState",
    "WatchWarning",
    "Watcher",
    "batch_sharpness",
    "critical_sharpness",
    "critical_sharpness_along",
    "diagnose",
    "directional_sharpness",
    "gradient_noise_scale",
    "preconditioned_sharpness",
    "probe",
    "sharpness_by_block",
    "watch",
    "watch_loss",
]


def __getattr__(name: str) -> Any:
    if name == "Moment":
        hint = "thalweg.measure.Moment is now called StepState"
        warnings.warn(hint, DeprecationWarning, stacklevel=2)
        return StepState
    raise AttributeError(f"module 'thalweg.measure' has no attribute {name!r}")
