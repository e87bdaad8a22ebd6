"""Do the top k eigenvalues of the Hessian stand clear of the rest?"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from thalweg.analysis.claims.claim import Claim, Measurement, NotMeasurableError, Rule, SeedTables
from thalweg.analysis.claims.rows import rows

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


SPECTRUM_CLAIMS = (
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
    ),
)
