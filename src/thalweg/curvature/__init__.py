"""Curvature of a loss: operators, eigenspaces, and the subspace tracked through training.

Imports torch alone.
"""

from __future__ import annotations

from thalweg.curvature.batch_subspace import BatchSubspace
from thalweg.curvature.block_subspace import BlockSubspace, principal_directions
from thalweg.curvature.density import Estimate, SpectralDensity, spectral_density
from thalweg.curvature.eigensolver import NotConverged, eigenpairs, top_eigenpairs
from thalweg.curvature.first_order_sources import GradientSubspace, UpdateSubspace
from thalweg.curvature.gap import GapClosed, widest_gap
from thalweg.curvature.gauss_newton import GaussNewton, ResidualHessian
from thalweg.curvature.gradient_covariance import GradientCovariance
from thalweg.curvature.layout import ParameterLayout
from thalweg.curvature.lockstep.objective import LockstepObjective
from thalweg.curvature.lockstep.tracker import LockstepTracker
from thalweg.curvature.memory import ChunkHalved
from thalweg.curvature.objective import Objective
from thalweg.curvature.operators import DenseOperator, Hessian, OperatorAt, SymmetricOperator
from thalweg.curvature.preconditioned import MetricSubspace, Preconditioned
from thalweg.curvature.products import BlockProducts
from thalweg.curvature.source import FixedSubspace, Split, SubspaceSource, TrackerReport
from thalweg.curvature.subspace import Subspace, random_subspace
from thalweg.curvature.trace_estimation import TraceEstimate, trace
from thalweg.curvature.tracker import SubspaceTracker

__all__ = [
    "BatchSubspace",
    "BlockProducts",
    "BlockSubspace",
    "ChunkHalved",
    "DenseOperator",
    "Estimate",
    "FixedSubspace",
    "GapClosed",
    "GaussNewton",
    "GradientCovariance",
    "GradientSubspace",
    "Hessian",
    "LockstepObjective",
    "LockstepTracker",
    "MetricSubspace",
    "NotConverged",
    "Objective",
    "OperatorAt",
    "ParameterLayout",
    "Preconditioned",
    "ResidualHessian",
    "SpectralDensity",
    "Split",
    "Subspace",
    "SubspaceSource",
    "SubspaceTracker",
    "SymmetricOperator",
    "TraceEstimate",
    "TrackerReport",
    "UpdateSubspace",
    "eigenpairs",
    "principal_directions",
    "random_subspace",
    "spectral_density",
    "top_eigenpairs",
    "trace",
    "widest_gap",
]
