"""Symmetric operators of a loss: Hessian, Gauss-Newton, gradient covariance, other metrics."""

from __future__ import annotations

from thalweg.operators.gauss_newton import GaussNewton, ResidualHessian
from thalweg.operators.gradient_covariance import GradientCovariance
from thalweg.operators.hessian import Hessian
from thalweg.operators.preconditioned import Preconditioned
from thalweg.operators.symmetric import DenseOperator, OperatorAt, SymmetricOperator

__all__ = [
    "DenseOperator",
    "GaussNewton",
    "GradientCovariance",
    "Hessian",
    "OperatorAt",
    "Preconditioned",
    "ResidualHessian",
    "SymmetricOperator",
]
