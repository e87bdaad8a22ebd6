"""Second derivatives of a loss: operators, eigenspaces, and the subspace tracked through training.

Imports torch alone.
"""

from __future__ import annotations

from thalweg.curvature.eigensolver import NotConverged, top_eigenpairs
from thalweg.curvature.layout import ParameterLayout
from thalweg.curvature.objective import Objective
from thalweg.curvature.operators import DenseOperator, Hessian, SymmetricOperator
from thalweg.curvature.products import BlockProducts
from thalweg.curvature.source import FixedSubspace, Split, SubspaceSource, TrackerReport
from thalweg.curvature.subspace import Subspace, random_subspace
from thalweg.curvature.tracker import SubspaceTracker

__all__ = [
    "BlockProducts",
    "DenseOperator",
    "FixedSubspace",
    "Hessian",
    "NotConverged",
    "Objective",
    "ParameterLayout",
    "Split",
    "Subspace",
    "SubspaceSource",
    "SubspaceTracker",
    "SymmetricOperator",
    "TrackerReport",
    "random_subspace",
    "top_eigenpairs",
]
