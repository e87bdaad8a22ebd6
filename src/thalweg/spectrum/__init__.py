"""Eigenvalues and eigenvectors of an operator: solver, gap, density, trace, subspace."""

from __future__ import annotations

from thalweg.spectrum.density import Estimate, SpectralDensity, spectral_density
from thalweg.spectrum.eigensolver import NotConverged, eigenpairs, top_eigenpairs
from thalweg.spectrum.gap import GapClosed, widest_gap
from thalweg.spectrum.metric_subspace import MetricSubspace
from thalweg.spectrum.subspace import Subspace, random_subspace
from thalweg.spectrum.trace_estimation import TraceEstimate, trace

__all__ = [
    "Estimate",
    "GapClosed",
    "MetricSubspace",
    "NotConverged",
    "SpectralDensity",
    "Subspace",
    "TraceEstimate",
    "eigenpairs",
    "random_subspace",
    "spectral_density",
    "top_eigenpairs",
    "trace",
    "widest_gap",
]
