"""The derivative of a whole training run with respect to where it starts."""

from __future__ import annotations

from thalweg.contrib.training_jacobian.jacobian import TrainingJacobian, training_jacobian
from thalweg.contrib.training_jacobian.training_run import TrainingRun, trained_parameters

__all__ = ["TrainingJacobian", "TrainingRun", "trained_parameters", "training_jacobian"]
