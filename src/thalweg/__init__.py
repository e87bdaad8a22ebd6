"""Thalweg: the dominant Hessian subspace of a neural network, followed at every training step.

    import thalweg

    objective = thalweg.Objective(model, loss, (inputs, targets))
    tracker = thalweg.SubspaceTracker(objective, k=10)
    subspace = tracker.update()
    subspace.alignment(objective.gradient())

What most people need stands here; the rest is in the rooms: `thalweg.loss`, `thalweg.operators`,
`thalweg.spectrum`, `thalweg.tracking`, `thalweg.optim`, `thalweg.measure`, `thalweg.contrib`,
`thalweg.integrations`, `thalweg.problems`, `thalweg.lab`, `thalweg.analysis`. Names are imported
when they are first used: `import thalweg` alone is quick.
"""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thalweg.lab.store.frames import load as load
    from thalweg.lab.study import reproduce as reproduce
    from thalweg.lab.study import run as run
    from thalweg.loss.function_loss import FunctionLoss as FunctionLoss
    from thalweg.loss.objective import Objective as Objective
    from thalweg.measure.batch_sharpness import batch_sharpness as batch_sharpness
    from thalweg.measure.diagnosis import diagnose as diagnose
    from thalweg.measure.preconditioned_sharpness import (
        preconditioned_sharpness as preconditioned_sharpness,
    )
    from thalweg.measure.probes import probe as probe
    from thalweg.measure.watch import watch as watch
    from thalweg.operators.gauss_newton import GaussNewton as GaussNewton
    from thalweg.operators.gauss_newton import ResidualHessian as ResidualHessian
    from thalweg.operators.gradient_covariance import GradientCovariance as GradientCovariance
    from thalweg.operators.hessian import Hessian as Hessian
    from thalweg.operators.preconditioned import Preconditioned as Preconditioned
    from thalweg.optim.sam import SAM as SAM
    from thalweg.optim.split import SplitUpdate as SplitUpdate
    from thalweg.optim.stability import stability_threshold as stability_threshold
    from thalweg.spectrum.curvature_profile import curvature_profile as curvature_profile
    from thalweg.spectrum.density import spectral_density as spectral_density
    from thalweg.spectrum.eigensolver import NotConverged as NotConverged
    from thalweg.spectrum.eigensolver import eigenpairs as eigenpairs
    from thalweg.spectrum.eigensolver import top_eigenpairs as top_eigenpairs
    from thalweg.spectrum.gap import GapClosed as GapClosed
    from thalweg.spectrum.subspace import Subspace as Subspace
    from thalweg.spectrum.threshold_split import split_at as split_at
    from thalweg.spectrum.trace_estimation import trace as trace
    from thalweg.tracking.source import TargetMissed as TargetMissed
    from thalweg.tracking.tracker import SubspaceTracker as SubspaceTracker

__version__ = "0.2.0.dev0"

# Where each name comes from. The second table: names that stood here before 0.2, by room.
_NAMES = {
    "loss": "FunctionLoss Objective",
    "operators": "GaussNewton GradientCovariance Hessian Preconditioned ResidualHessian",
    "spectrum": (
        "GapClosed NotConverged Subspace curvature_profile eigenpairs spectral_density split_at"
        " trace"
    ),
    "tracking": "SubspaceTracker TargetMissed",
    "optim": "SAM SplitUpdate stability_threshold",
    "measure": "batch_sharpness diagnose preconditioned_sharpness probe watch",
    "lab": "load reproduce run",
}
_MOVED = {
    "loss": "BlockProducts ChunkHalved LockstepObjective ParameterLayout",
    "operators": "DenseOperator OperatorAt SymmetricOperator",
    "spectrum": "Estimate MetricSubspace SpectralDensity TraceEstimate random_subspace widest_gap",
    "tracking": (
        "BatchSubspace BlockSubspace FixedSubspace GradientSubspace LockstepTracker"
        " OptimizerMetricSource Split SubspaceSource TrackerReport UpdateSubspace preconditioner"
        " principal_directions"
    ),
    "optim": "Combined LockstepSGD StabilityThreshold sam_threshold",
    "measure": "BatchSharpness Moment WatchWarning Watcher",
    "contrib": (
        "BlockSharpness ConstantPeriod LocalSGD PerturbationResponses QuadraticRule"
        " SimulatedWorkers SingularSpectrum SubspaceLangevin TrainingJacobian TrainingRun"
        " block_sharpness blockwise_groups coordinate_blocks dominant_and_bulk_blocks"
        " eigenvector_blocks flattest_directions perturbation_responses singular_spectrum"
        " trained_parameters training_jacobian"
    ),
    "integrations": "as_linear_operator",
    "lab": "load_spec run_study",
}
_HOME = {name: room for room, names in _NAMES.items() for name in names.split()}
# Still here, for the word is widely used; `eigenpairs` does the same by default.
_HOME["top_eigenpairs"] = "spectrum"
_RENAMED = {"Moment": "StepState", "run_study": "run"}
_FORMER_HOME = {name: room for room, names in _MOVED.items() for name in names.split()}

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f"thalweg.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    if name in _FORMER_HOME:
        home, new_name = f"thalweg.{_FORMER_HOME[name]}", _RENAMED.get(name, name)
        hint = f"thalweg.{name} has moved: from {home} import {new_name}"
        warnings.warn(hint, DeprecationWarning, stacklevel=2)
        return getattr(importlib.import_module(home), new_name)
    raise AttributeError(f"module 'thalweg' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
