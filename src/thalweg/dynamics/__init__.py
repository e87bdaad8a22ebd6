"""What is measured along a training trajectory."""

from __future__ import annotations

# Imported for the probes that they register.
import thalweg.dynamics.batch_probes
import thalweg.dynamics.block_probes
import thalweg.dynamics.curvature_energy
import thalweg.dynamics.stability_probes  # noqa: F401
from thalweg.dynamics.batch_curvature import BatchSharpness, batch_sharpness
from thalweg.dynamics.block_sharpness import BlockSharpness, block_sharpness
from thalweg.dynamics.moment import BranchPoint, Moment
from thalweg.dynamics.optimizer_metric import OptimizerMetricSource
from thalweg.dynamics.perturbation_response import (
    PerturbationResponses,
    perturbation_responses,
)
from thalweg.dynamics.preconditioning import preconditioned_sharpness, preconditioner
from thalweg.dynamics.probes import PROBES, Probe, probe
from thalweg.dynamics.singular_spectrum import (
    SingularSpectrum,
    flattest_directions,
    singular_spectrum,
)
from thalweg.dynamics.stability import (
    StabilityThreshold,
    sam_threshold,
    stability_threshold,
)
from thalweg.dynamics.training_jacobian import TrainingJacobian, training_jacobian
from thalweg.dynamics.training_run import TrainingRun, trained_parameters
from thalweg.dynamics.watcher import Watcher, WatchWarning
from thalweg.dynamics.watching import watch

__all__ = [
    "PROBES",
    "BatchSharpness",
    "BlockSharpness",
    "BranchPoint",
    "Moment",
    "OptimizerMetricSource",
    "PerturbationResponses",
    "Probe",
    "SingularSpectrum",
    "StabilityThreshold",
    "TrainingJacobian",
    "TrainingRun",
    "WatchWarning",
    "Watcher",
    "batch_sharpness",
    "block_sharpness",
    "flattest_directions",
    "perturbation_responses",
    "preconditioned_sharpness",
    "preconditioner",
    "probe",
    "sam_threshold",
    "singular_spectrum",
    "stability_threshold",
    "trained_parameters",
    "training_jacobian",
    "watch",
]
