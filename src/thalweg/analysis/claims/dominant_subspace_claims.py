"""The dominant subspace: does it stand clear of the rest, last, and hold the updates?

That it holds the gradient is claimed with the main finding (`main_finding_claims.py`).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from thalweg.analysis.claims.claim import Claim, Measurement, NotMeasurableError, Rule, SeedTables
from thalweg.analysis.claims.statistics import late_mean, rows
from thalweg.registry import claims

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Eigenvalues below this part of lambda_1 count as zero (they would have no logarithm).
ZERO_EIGENVALUE = 1e-6


def boundary_step(eigenvalues: NDArray[np.float64]) -> float:
    """How much larger the step across the boundary k is than the step inside the top k.

    eigenvalues (2k,), descending. With h = ceil(k/2) and a, b, c the medians of the first h and
    the last h of the top k, and of the first h of the next k: (b / c) / (a / b).
    """
    k = len(eigenvalues) // 2
    half = math.ceil(k / 2)
    if not eigenvalues[0] > 0:
        raise NotMeasurableError("the largest eigenvalue is not positive")
    floored = np.maximum(eigenvalues, ZERO_EIGENVALUE * eigenvalues[0])
    first, last, following = (
        float(np.median(floored[start : start + half])) for start in (0, k - half, k)
    )
    return last**2 / (first * following)


def measure_spectrum_gap(seed: SeedTables) -> Measurement:
    """Geometric mean over the solves of the plain branch's last half of `boundary_step`.

    Why not lambda_k / lambda_{k+1}: it rests on one pair. Why not median(top k) / median(next k):
    it is large for any fast decay, with or without a gap (geometric decay by e^-0.2 an index: 7.4
    for k = 10). The step across the boundary in units of the step inside the top k is exactly 1
    for every geometric decay and below 1 for every power law, so what exceeds 1 is a gap.
    """
    table, branch = rows(seed, "plain"), seed.names["plain"]
    middle = (table["step"].iloc[0] + table["step"].iloc[-1]) / 2
    late = table[table["step"] >= middle]
    solves = [
        np.asarray(row, dtype=np.float64)
        for row in late["solved_eigenvalues"]
        if row is not None and np.ndim(row) == 1 and len(row) >= 2
    ]
    if not solves:
        raise NotMeasurableError(f"no solve of 2k eigenvalues in the last half of {branch}")
    if not all(np.isfinite(solve).all() for solve in solves):
        raise NotMeasurableError(f"eigenvalues of {branch} are not finite")
    steps = [math.log(boundary_step(solve)) for solve in solves]
    k = len(solves[0]) // 2
    following = [float(solve[k] / solve[k - 1]) for solve in solves]
    medians = [float(np.median(solve[:k]) / np.median(solve[k:])) for solve in solves]
    return Measurement(
        math.exp(float(np.mean(steps))),
        {
            "lambda_{k+1} / lambda_k": float(np.mean(following)),
            "median of the top k / median of the next k": float(np.median(medians)),
        },
    )


claims.add_named(
    Claim(
        name="spectrum-gap",
        statement="The top k eigenvalues of the Hessian stand clear of the next k.",
        source="Song, Ahn, Yun 2025, figure 15; Sagun et al. 2017",
        statistic="step from the top k to the next k / step inside the top k, last half of the "
        "plain branch",
        measure=measure_spectrum_gap,
        rule=Rule(1.5, "above"),
        refuted_by="a flat or evenly decaying spectrum gives 1, a power law less",
        needs_roles=("plain",),
        needs_columns=("solved_eigenvalues",),
        logarithmic=True,
    )
)

# A half: a direction of the old subspace then lies more in the new one than outside of it. For
# random subspaces the overlap is k / P, below 0.001 in every study here. The branch must start
# from a trained checkpoint: the subspace of the initial parameters is another one.
claims.add_named(
    Claim(
        name="subspace-persists",
        statement="The dominant subspace stays much the same while training continues.",
        source="Gur-Ari, Roberts, Dyer 2018, section 3",
        statistic="overlap of S_k with S_k at the branch point, trace(P P') / k, mean over the "
        "last half of the plain branch",
        measure=late_mean("overlap_branch_point"),
        rule=Rule(0.5, "above"),
        refuted_by="random subspaces of dimension k overlap by k / P",
        needs_roles=("plain",),
        needs_columns=("overlap_branch_point",),
    )
)

# 0.7: half of the update's squared length. Lower than for the gradient, since mini-batch noise
# has a part in the bulk (chi of a mini-batch gradient is 0.8 where the full gradient has 0.96).
claims.add_named(
    Claim(
        name="update-aligns",
        statement="The optimizer's update, too, lies mostly in the dominant subspace.",
        source="Song, Ahn, Yun 2025, on sharpness-aware minimization, momentum and Adam",
        statistic="chi_k of the proposed update, mean over the last half of the plain branch",
        measure=late_mean("alignment_proposed"),
        rule=Rule(0.7, "above"),
        refuted_by="orthogonalized updates (Muon): all directions have equal weight, chi is 0.2",
        needs_roles=("plain",),
        needs_columns=("alignment_proposed",),
    )
)
