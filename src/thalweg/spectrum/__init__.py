"""The spectrum of an operator: eigenpairs, gap, density, trace; a vector's place in it."""

from __future__ import annotations

from thalweg.spectrum.curvature_profile import (
    CurvatureProfile,
    Share,
    curvature_profile,
    curvature_profiles,
)
from thalweg.spectrum.density import Estimate, SpectralDensity, spectral_density
from thalweg.spectrum.eigensolver import NotConverged, eigenpairs, top_eigenpairs
from thalweg.spectrum.gap import GapClosed, widest_gap
from thalweg.spectrum.metric_subspace import MetricSubspace
from thalweg.spectrum.subspace import Subspace, random_subspace
from thalweg.spectrum.threshold_split import ThresholdSplit, split_at
from thalweg.spectrum.trace_estimation import TraceEstimate, trace

__all__ = [
    "CurvatureProfile",
    "Estimate",
    "GapClosed",
    "MetricSubspace",
    "NotConverged",
    "Share",
    "SpectralDensity",
    "Subspace",
    "ThresholdSplit",
    "TraceEstimate",
    "curvature_profile",
    "curvature_profiles",
    "eigenpairs",
    "random_subspace",
    "spectral_density",
    "split_at",
    "top_eigenpairs",
    "trace",
    "widest_gap",
]
