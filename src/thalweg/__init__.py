"""Thalweg: the dominant Hessian subspace of a neural network, followed at every training step.

    import thalweg

    objective = thalweg.Objective(model, loss, (inputs, targets))
    tracker = thalweg.SubspaceTracker(objective, k=10)
    subspace = tracker.update()
    subspace.alignment(objective.gradient())

Names are imported when they are first used: `import thalweg` alone is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thalweg.curvature import (
        BlockProducts,
        ChunkHalved,
        DenseOperator,
        Estimate,
        FixedSubspace,
        GapClosed,
        GaussNewton,
        GradientCovariance,
        Hessian,
        MetricSubspace,
        NotConverged,
        Objective,
        OperatorAt,
        ParameterLayout,
        Preconditioned,
        ResidualHessian,
        SpectralDensity,
        Split,
        Subspace,
        SubspaceSource,
        SubspaceTracker,
        SymmetricOperator,
        TraceEstimate,
        TrackerReport,
        eigenpairs,
        random_subspace,
        spectral_density,
        top_eigenpairs,
        trace,
        widest_gap,
    )
    from thalweg.dynamics import (
        BatchSharpness,
        BlockSharpness,
        Moment,
        OptimizerMetricSource,
        SingularSpectrum,
        StabilityThreshold,
        TrainingJacobian,
        Watcher,
        WatchWarning,
        batch_sharpness,
        block_sharpness,
        flattest_directions,
        preconditioned_sharpness,
        preconditioner,
        probe,
        sam_threshold,
        singular_spectrum,
        stability_threshold,
        training_jacobian,
        watch,
    )
    from thalweg.integrations import (
        as_linear_operator,
    )
    from thalweg.lab.spec import (
        load_spec,
    )
    from thalweg.lab.store import (
        load,
    )
    from thalweg.lab.study import (
        reproduce,
        run_study,
    )
    from thalweg.optim import (
        SAM,
        Combined,
        ConstantPeriod,
        LocalSGD,
        QuadraticRule,
        SimulatedWorkers,
        SplitUpdate,
        SubspaceLangevin,
        blockwise_groups,
        coordinate_blocks,
        dominant_and_bulk_blocks,
        eigenvector_blocks,
    )

__version__ = "0.1.0"

__all__ = [
    "SAM",
    "BatchSharpness",
    "BlockProducts",
    "BlockSharpness",
    "ChunkHalved",
    "Combined",
    "ConstantPeriod",
    "DenseOperator",
    "Estimate",
    "FixedSubspace",
    "GapClosed",
    "GaussNewton",
    "GradientCovariance",
    "Hessian",
    "LocalSGD",
    "MetricSubspace",
    "Moment",
    "NotConverged",
    "Objective",
    "OperatorAt",
    "OptimizerMetricSource",
    "ParameterLayout",
    "Preconditioned",
    "QuadraticRule",
    "ResidualHessian",
    "SimulatedWorkers",
    "SingularSpectrum",
    "SpectralDensity",
    "Split",
    "SplitUpdate",
    "StabilityThreshold",
    "Subspace",
    "SubspaceLangevin",
    "SubspaceSource",
    "SubspaceTracker",
    "SymmetricOperator",
    "TraceEstimate",
    "TrackerReport",
    "TrainingJacobian",
    "WatchWarning",
    "Watcher",
    "__version__",
    "as_linear_operator",
    "batch_sharpness",
    "block_sharpness",
    "blockwise_groups",
    "coordinate_blocks",
    "dominant_and_bulk_blocks",
    "eigenpairs",
    "eigenvector_blocks",
    "flattest_directions",
    "load",
    "load_spec",
    "preconditioned_sharpness",
    "preconditioner",
    "probe",
    "random_subspace",
    "reproduce",
    "run_study",
    "sam_threshold",
    "singular_spectrum",
    "spectral_density",
    "stability_threshold",
    "top_eigenpairs",
    "trace",
    "training_jacobian",
    "watch",
    "widest_gap",
]

_PLACES = {
    "BatchSharpness": "thalweg.dynamics",
    "BlockProducts": "thalweg.curvature",
    "BlockSharpness": "thalweg.dynamics",
    "ChunkHalved": "thalweg.curvature",
    "Combined": "thalweg.optim",
    "ConstantPeriod": "thalweg.optim",
    "DenseOperator": "thalweg.curvature",
    "Estimate": "thalweg.curvature",
    "FixedSubspace": "thalweg.curvature",
    "GapClosed": "thalweg.curvature",
    "GaussNewton": "thalweg.curvature",
    "GradientCovariance": "thalweg.curvature",
    "Hessian": "thalweg.curvature",
    "LocalSGD": "thalweg.optim",
    "MetricSubspace": "thalweg.curvature",
    "Moment": "thalweg.dynamics",
    "NotConverged": "thalweg.curvature",
    "Objective": "thalweg.curvature",
    "OperatorAt": "thalweg.curvature",
    "OptimizerMetricSource": "thalweg.dynamics",
    "ParameterLayout": "thalweg.curvature",
    "Preconditioned": "thalweg.curvature",
    "QuadraticRule": "thalweg.optim",
    "ResidualHessian": "thalweg.curvature",
    "SAM": "thalweg.optim",
    "SimulatedWorkers": "thalweg.optim",
    "SingularSpectrum": "thalweg.dynamics",
    "SpectralDensity": "thalweg.curvature",
    "Split": "thalweg.curvature",
    "SplitUpdate": "thalweg.optim",
    "StabilityThreshold": "thalweg.dynamics",
    "Subspace": "thalweg.curvature",
    "SubspaceLangevin": "thalweg.optim",
    "SubspaceSource": "thalweg.curvature",
    "SubspaceTracker": "thalweg.curvature",
    "SymmetricOperator": "thalweg.curvature",
    "TraceEstimate": "thalweg.curvature",
    "TrackerReport": "thalweg.curvature",
    "TrainingJacobian": "thalweg.dynamics",
    "WatchWarning": "thalweg.dynamics",
    "Watcher": "thalweg.dynamics",
    "as_linear_operator": "thalweg.integrations",
    "batch_sharpness": "thalweg.dynamics",
    "block_sharpness": "thalweg.dynamics",
    "blockwise_groups": "thalweg.optim",
    "coordinate_blocks": "thalweg.optim",
    "dominant_and_bulk_blocks": "thalweg.optim",
    "eigenpairs": "thalweg.curvature",
    "eigenvector_blocks": "thalweg.optim",
    "flattest_directions": "thalweg.dynamics",
    "load": "thalweg.lab.store",
    "load_spec": "thalweg.lab.spec",
    "preconditioned_sharpness": "thalweg.dynamics",
    "preconditioner": "thalweg.dynamics",
    "probe": "thalweg.dynamics",
    "random_subspace": "thalweg.curvature",
    "reproduce": "thalweg.lab.study",
    "run_study": "thalweg.lab.study",
    "sam_threshold": "thalweg.dynamics",
    "singular_spectrum": "thalweg.dynamics",
    "spectral_density": "thalweg.curvature",
    "stability_threshold": "thalweg.dynamics",
    "top_eigenpairs": "thalweg.curvature",
    "trace": "thalweg.curvature",
    "training_jacobian": "thalweg.dynamics",
    "watch": "thalweg.dynamics",
    "widest_gap": "thalweg.curvature",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'thalweg' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PLACES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
