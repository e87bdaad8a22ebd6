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
        DenseOperator,
        FixedSubspace,
        Hessian,
        Objective,
        Subspace,
        SubspaceTracker,
        random_subspace,
        top_eigenpairs,
    )
    from thalweg.dynamics import Moment, probe
    from thalweg.lab.spec import load_spec
    from thalweg.lab.store import load
    from thalweg.lab.study import reproduce, run_study
    from thalweg.optim import SplitUpdate

__version__ = "0.1.0"

__all__ = [
    "DenseOperator",
    "FixedSubspace",
    "Hessian",
    "Moment",
    "Objective",
    "SplitUpdate",
    "Subspace",
    "SubspaceTracker",
    "__version__",
    "load",
    "load_spec",
    "probe",
    "random_subspace",
    "reproduce",
    "run_study",
    "top_eigenpairs",
]

_PLACES = {
    "DenseOperator": "thalweg.curvature",
    "FixedSubspace": "thalweg.curvature",
    "Hessian": "thalweg.curvature",
    "Moment": "thalweg.dynamics",
    "Objective": "thalweg.curvature",
    "SplitUpdate": "thalweg.optim",
    "Subspace": "thalweg.curvature",
    "SubspaceTracker": "thalweg.curvature",
    "load": "thalweg.lab.store",
    "load_spec": "thalweg.lab.spec",
    "probe": "thalweg.dynamics",
    "random_subspace": "thalweg.curvature",
    "reproduce": "thalweg.lab.study",
    "run_study": "thalweg.lab.study",
    "top_eigenpairs": "thalweg.curvature",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'thalweg' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PLACES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
