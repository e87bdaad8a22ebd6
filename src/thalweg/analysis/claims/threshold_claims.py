"""Does training happen above a curvature? The main finding asked without a gap and without a k.

Under cross-entropy, and in language models, no gap of the spectrum says where the dominant subspace
ends. The part of an update above a curvature tau, f(H) v with f a smooth step at tau, needs none.
That its Dom- stalls and its Bulk- goes on are the claims of the main finding, `dominant-stalls` and
`bulk-suffices`, judged at each tau (`main_finding_claims.py`).

The rules stood here before the first run of the study.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from thalweg.analysis.claims.claim import Claim, Measurement, NotMeasurableError, Rule, SeedTables
from thalweg.analysis.claims.statistics import (
    log_ratio,
    measured,
    measured_entry,
    require_progress,
    require_same_start,
    rows,
    start_and_end,
)
from thalweg.registry import claims

if TYPE_CHECKING:
    from thalweg.analysis.claims.statistics import Vector

#: The part of the sharpness above which most of the gradient should lie.
PART = 0.1


def measure_share_above(seed: SeedTables) -> Measurement:
    """Mean over the plain branch's last half of the gradient's share above a tenth of lambda_1."""
    from thalweg.measure.curvature_shares import PARTS_OF_SHARPNESS

    index = PARTS_OF_SHARPNESS.index(PART)
    steps, shares = measured_entry(seed, "plain", "gradient_shares", index)
    late = shares[steps >= (steps[0] + steps[-1]) / 2]
    return Measurement(float(late.mean()), {"lowest single step": float(late.min())})


def measure_agreement(seed: SeedTables) -> Measurement:
    """Mean over the last half of abs(share above sqrt(lambda_k lambda_{k+1}) - chi_k^2).

    Not measurable without a clear gap at any of these steps: there S_k is not well defined.
    """
    steps, chi = measured(seed, "plain", "alignment_gradient")
    table = rows(seed, "plain")
    known = np.isin(table["step"].to_numpy(dtype=np.float64), steps)
    late = steps >= (steps[0] + steps[-1]) / 2
    share, gap = (
        table[name].to_numpy(dtype=np.float64)[known][late]
        for name in ("gradient_share_at_gap", "gap_ratio")
    )
    at_gap = np.isfinite(share)
    if not at_gap.any():
        raise NotMeasurableError(_no_gap(seed.names["plain"], gap))
    squared = chi[late][at_gap] ** 2
    apart = np.abs(share[at_gap] - squared)
    return Measurement(
        float(apart.mean()),
        {
            "share above the gap": float(share[at_gap].mean()),
            "chi_k squared": float(squared.mean()),
            "part of the rows with a gap": float(at_gap.mean()),
        },
    )


def _no_gap(branch: str, gap: Vector) -> str:
    known = gap[np.isfinite(gap)]
    if not len(known):
        return f"lambda_(k+1) of {branch} was not measured"
    mean = float(known.mean())
    return f"no clear gap in {branch}: lambda_(k+1) / lambda_k is {mean:.2f}"


def measure_progress_below(seed: SeedTables) -> Measurement:
    """log(L_0 / L_bulk) / log(L_0 / L_plain), L_0 the loss at the branch point.

    Minus infinity where the bulk branch diverges and the plain one does not.
    """
    require_progress(seed, "plain")
    start, plain = start_and_end(seed, "plain")
    require_same_start(seed, "plain", "bulk")
    _, bulk = start_and_end(seed, "bulk")
    return Measurement(
        log_ratio(start, bulk, "a loss") / math.log(start / plain),
        {"bulk end / branch point": bulk / start, "plain end / branch point": plain / start},
    )


# A half is the meaning of "most". A tenth of lambda_1 is the middle of the thresholds looked at.
claims.add_named(
    Claim(
        name="gradient-above-threshold",
        statement="Most of the gradient lies at curvatures above a tenth of the sharpness.",
        source="Song, Ahn, Yun 2025, section 3, asked of a curvature in place of a k",
        statistic="share of norm(gradient)^2 above lambda_1 / 10, mean over the last half of the "
        "plain branch",
        measure=measure_share_above,
        rule=Rule(0.5, "above"),
        refuted_by="a random vector has the share of the eigenvalues that are above: below 0.01",
        needs_roles=("plain",),
        needs_columns=("gradient_shares",),
    )
)

# 0.05: the two are one number but for the smooth step's leak at the gap, 2 %, and their errors.
claims.add_named(
    Claim(
        name="share-equals-alignment",
        statement="Where the spectrum has a gap, the part above a curvature in it is that in S_k.",
        source="a check of Thalweg's own: chi_k^2 is the share above any curvature in the gap",
        statistic="distance of the gradient's share above sqrt(lambda_k lambda_(k+1)) from "
        "chi_k^2, mean over the last half of the plain branch",
        measure=measure_agreement,
        rule=Rule(0.05, "below"),
        refuted_by="a split at another curvature, or a subspace that is not the dominant one",
        needs_roles=("plain",),
        needs_columns=("alignment_gradient", "gradient_share_at_gap", "gap_ratio"),
    )
)

# A half is the meaning of "most". Parts do not add up to one: each branch goes its own way.
claims.add_named(
    Claim(
        name="progress-below-threshold",
        statement="Most of the progress is made without the part of the updates above a curvature.",
        source="Song, Ahn, Yun 2025, section 3, asked of a curvature in place of a k",
        statistic="log-decrease of the loss, bulk branch / plain branch",
        measure=measure_progress_below,
        rule=Rule(0.5, "above"),
        refuted_by="least squares whose curvatures are all above: there Bulk-SGD stands still",
        needs_roles=("plain", "bulk"),
        needs_columns=("loss",),
    )
)
