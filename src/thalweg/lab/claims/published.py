"""Which published statements are tested, by which statistic, and which number decides?

Each `measure_...` function turns the tables of one seed into one number; the `Claim` below it
fixes the number that decides. Source of all: Song, Ahn, Yun 2025, "Does SGD really happen in tiny
subspaces?", arXiv 2405.16002. A plugin adds its own claims with `add_claim`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from thalweg.errors import invalid
from thalweg.lab.claims.judgement import (
    DEFAULT_ROLES,
    Claim,
    Measurement,
    NonFiniteError,
    NotMeasurableError,
    Rule,
    SeedTables,
    Verdict,
    judge,
    judge_all,
)

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    Vector = NDArray[np.float64]

__all__ = [
    "CLAIMS",
    "DEFAULT_ROLES",
    "Claim",
    "Measurement",
    "NonFiniteError",
    "NotMeasurableError",
    "Rule",
    "SeedTables",
    "Verdict",
    "add_claim",
    "judge",
    "judge_all",
]

CLAIMS: dict[str, Claim] = {}

#: Parts of a branch over which a value at its end, or at a horizon, is averaged.
END_WINDOW, HORIZON_WINDOW = 0.10, 0.05
HORIZONS = (0.25, 0.5, 1.0)
#: The plain branch must lower its loss by this factor at least before Dom is compared with it.
LEAST_PLAIN_DECREASE = 1.02
#: Eigenvalues below this part of lambda_1 count as zero (they would have no logarithm).
ZERO_EIGENVALUE = 1e-6


def add_claim(claim: Claim) -> Claim:
    """Register a claim under its name; raises InvalidInput if the name is taken."""
    if claim.name in CLAIMS:
        raise invalid("claim name", claim.name, "a name not used yet", "choose another name")
    CLAIMS[claim.name] = claim
    return claim


def measured(table: pd.DataFrame, column: str, branch: str) -> tuple[Vector, Vector]:
    """Steps and values of the rows where the column was measured, both (rows,).

    Raises NotMeasurableError where nothing was measured; NonFiniteError where a value is infinite,
    or the values stop well before the branch does: divergence leaves NaN from there on.
    """
    steps = table["step"].to_numpy(dtype=np.float64)
    values = table[column].to_numpy(dtype=np.float64)
    known = ~np.isnan(values)
    if not known.any():
        raise NotMeasurableError(f"{column} of {branch} was not measured")
    kept, values = steps[known], values[known]
    spacing = float(np.diff(kept).max()) if len(kept) > 1 else 0.0
    # Update columns lack the last row by design, and a slower probe misses up to its own spacing.
    silent = steps[-1] - kept[-1] > 2 * max(spacing, float(np.diff(steps[-2:]).sum()))
    if silent or not np.isfinite(values).all():
        raise NonFiniteError(f"{column} of {branch} becomes non-finite after step {kept[-1]:.0f}")
    return kept, values


def start_and_end(table: pd.DataFrame, branch: str) -> tuple[float, float]:
    """Loss at the branch point, and its mean over the last tenth of the measured rows."""
    _, loss = measured(table, "loss", branch)
    return float(loss[0]), float(loss[-math.ceil(END_WINDOW * len(loss)) :].mean())


def require_same_start(first: float, second: float) -> None:
    """Raise NotMeasurableError unless two branches begin at one checkpoint (rounding aside)."""
    if not math.isclose(first, second, rel_tol=1e-3):
        raise NotMeasurableError(f"branches start at different losses ({first:.6g}, {second:.6g})")


def measure_alignment(seed: SeedTables) -> Measurement:
    """Mean over the last half of the plain branch of chi_k(g) = norm(P_k g) / norm(g)."""
    steps, chi = measured(seed.table("plain"), "alignment_gradient", seed.names["plain"])
    late = steps >= (steps[0] + steps[-1]) / 2
    return Measurement(
        float(chi[late].mean()), {"lowest single step of the late window": float(chi[late].min())}
    )


add_claim(
    Claim(
        name="gradient-aligns",
        statement="The gradient of the training loss lies almost wholly in the dominant subspace.",
        source="Song, Ahn, Yun 2025, section 3; Gur-Ari, Roberts, Dyer 2018",
        statistic="chi_k of the full gradient, mean over the last half of the plain branch",
        measure=measure_alignment,
        rule=Rule(0.9, "above"),
        refuted_by="k random directions give sqrt(k / P): about 0.02 for 17,610 parameters",
        needs_roles=("plain",),
        needs_columns=("alignment_gradient",),
    )
)


def measure_dominant_progress(seed: SeedTables) -> Measurement:
    """r = log(L_0 / L_dominant) / log(L_0 / L_plain), L_0 the loss at the branch point.

    Negative where the loss of the dominant branch climbs. Not measurable where the plain branch
    makes no progress: then there is nothing to compare with.
    """
    start, plain = start_and_end(seed.table("plain"), seed.names["plain"])
    other, dominant = start_and_end(seed.table("dominant"), seed.names["dominant"])
    require_same_start(start, other)
    if min(start, plain, dominant) <= 0 or start / plain < LEAST_PLAIN_DECREASE:
        raise NotMeasurableError(
            f"the loss of {seed.names['plain']} goes from {start:.4g} to {plain:.4g}: "
            "no decrease to compare with"
        )
    progress = math.log(start / dominant) / math.log(start / plain)
    return Measurement(
        progress,
        {
            "dominant end / branch point": dominant / start,
            "plain end / branch point": plain / start,
        },
    )


add_claim(
    Claim(
        name="dominant-stalls",
        statement="Updates projected on the dominant subspace stop lowering the training loss.",
        source="Song, Ahn, Yun 2025, section 3, figure 1",
        statistic="log-decrease of the loss, dominant branch / plain branch",
        measure=measure_dominant_progress,
        rule=Rule(0.1, "below"),
        refuted_by="least squares whose Hessian has rank k: there Dom-SGD is SGD, the ratio is 1",
        needs_roles=("plain", "dominant"),
        needs_columns=("loss",),
    )
)


def measure_bulk_ratio(seed: SeedTables) -> Measurement:
    """Worst over horizons of L_bulk / L_plain, paired step by step: a geometric mean per window.

    Infinite where the bulk branch diverges and the plain one does not.
    """
    steps, plain = measured(seed.table("plain"), "loss", seed.names["plain"])
    try:
        bulk_steps, bulk = measured(seed.table("bulk"), "loss", seed.names["bulk"])
    except NonFiniteError as error:
        return Measurement(math.inf, note=str(error))
    require_same_start(float(plain[0]), float(bulk[0]))
    common, of_plain, of_bulk = np.intersect1d(steps, bulk_steps, return_indices=True)
    if min(plain.min(), bulk.min()) <= 0:
        raise NotMeasurableError("a loss of zero has no logarithm")
    log_ratio = np.log(bulk[of_bulk] / plain[of_plain])
    length = common[-1] - common[0]
    ratios: dict[str, float] = {}
    for horizon in HORIZONS:
        end = common[0] + horizon * length
        window = (common <= end) & (common > end - HORIZON_WINDOW * length)
        if not window.any():
            raise NotMeasurableError(f"no loss was measured near step {end:.0f}")
        ratios[f"ratio at {horizon:.0%} of the branch"] = math.exp(log_ratio[window].mean())
    return Measurement(max(ratios.values()), ratios)


add_claim(
    Claim(
        name="bulk-suffices",
        statement="Without the dominant part of its updates, SGD lowers the loss about as far.",
        source="Song, Ahn, Yun 2025, section 3, figure 1",
        statistic="loss, bulk branch / plain branch, worst at 25, 50 and 100 % of the branch",
        measure=measure_bulk_ratio,
        rule=Rule(1.1, "below"),
        refuted_by="least squares whose Hessian has rank k: there Bulk-SGD stands still",
        needs_roles=("plain", "bulk"),
        needs_columns=("loss",),
        logarithmic=True,
    )
)


def boundary_step(eigenvalues: Vector) -> float:
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
    table, branch = seed.table("plain"), seed.names["plain"]
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


add_claim(
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
