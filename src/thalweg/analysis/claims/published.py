"""Which published statements are tested: all claims that come with the package.

A module a theme: each states its claims in one tuple, with the statistic that decides and the
number it is held against. The numbers were fixed before the runs; where one is a matter of choice,
the module says how it was chosen. Source of most: Song, Ahn, Yun 2025, "Does SGD really happen in
tiny subspaces?", arXiv 2405.16002.
"""

from __future__ import annotations

from thalweg.analysis.claims.alignment import ALIGNMENT_CLAIMS
from thalweg.analysis.claims.block_sharpness import BLOCK_CLAIMS
from thalweg.analysis.claims.bulk_amplified import BULK_AMPLIFIED_CLAIMS
from thalweg.analysis.claims.dion import DION_CLAIMS
from thalweg.analysis.claims.edge import EDGE_CLAIMS
from thalweg.analysis.claims.grad_power import GRAD_POWER_CLAIMS
from thalweg.analysis.claims.judgement import (
    DEFAULT_ROLES,
    Claim,
    ClaimUse,
    Measurement,
    NonFiniteError,
    NotMeasurableError,
    Rule,
    SeedTables,
    Verdict,
    judge,
    judge_all,
)
from thalweg.analysis.claims.langevin import LANGEVIN_CLAIMS
from thalweg.analysis.claims.local_sgd import LOCAL_SGD_CLAIMS
from thalweg.analysis.claims.main_finding import MAIN_CLAIMS
from thalweg.analysis.claims.noise import NOISE_CLAIMS
from thalweg.analysis.claims.optimizers import OPTIMIZER_CLAIMS
from thalweg.analysis.claims.quadratic import QUADRATIC_CLAIMS
from thalweg.analysis.claims.robustness import ROBUSTNESS_CLAIMS
from thalweg.analysis.claims.spectrum import SPECTRUM_CLAIMS
from thalweg.analysis.claims.training_jacobian import TRAINING_JACOBIAN_CLAIMS
from thalweg.analysis.claims.valley import VALLEY_CLAIMS
from thalweg.registry import claims

__all__ = [
    "DEFAULT_ROLES",
    "Claim",
    "ClaimUse",
    "Measurement",
    "NonFiniteError",
    "NotMeasurableError",
    "Rule",
    "SeedTables",
    "Verdict",
    "judge",
    "judge_all",
]

for _claim in (
    *MAIN_CLAIMS,
    *SPECTRUM_CLAIMS,
    *ALIGNMENT_CLAIMS,
    *NOISE_CLAIMS,
    *VALLEY_CLAIMS,
    *QUADRATIC_CLAIMS,
    *EDGE_CLAIMS,
    *OPTIMIZER_CLAIMS,
    *ROBUSTNESS_CLAIMS,
    *LOCAL_SGD_CLAIMS,
    *TRAINING_JACOBIAN_CLAIMS,
    *LANGEVIN_CLAIMS,
    *GRAD_POWER_CLAIMS,
    *DION_CLAIMS,
    *BLOCK_CLAIMS,
    *BULK_AMPLIFIED_CLAIMS,
):
    claims.add(_claim.name, _claim)
