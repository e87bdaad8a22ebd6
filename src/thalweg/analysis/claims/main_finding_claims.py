"""Does training happen in the dominant subspace? The gradient lies there; the progress does not.

Three branches of one checkpoint: the optimizer itself (plain), its updates projected on the
dominant subspace (dominant), and on the orthogonal complement (bulk).
"""

from __future__ import annotations

import math

import numpy as np

from thalweg.analysis.claims.claim import (
    Claim,
    Measurement,
    NonFiniteError,
    NotMeasurableError,
    Rule,
    SeedTables,
)
from thalweg.analysis.claims.statistics import (
    last_tenth,
    late_mean,
    log_ratio,
    measured,
    ratio,
    require_progress,
    require_same_start,
    start_and_end,
)
from thalweg.registry import claims

#: Parts of the branch at which the losses are compared, and over which each value is averaged.
HORIZONS, HORIZON_WINDOW = (0.25, 0.5, 1.0), 0.05


def measure_dominant_progress(seed: SeedTables) -> Measurement:
    """r = log(L_0 / L_dominant) / log(L_0 / L_plain), L_0 the loss at the branch point.

    Negative where the loss of the dominant branch climbs. Not measurable where the plain branch
    makes no progress: then there is nothing to compare with.
    """
    require_same_start(seed, "plain", "dominant")
    require_progress(seed, "plain")
    start, plain = start_and_end(seed, "plain")
    _, dominant = start_and_end(seed, "dominant")
    return Measurement(
        log_ratio(start, dominant, "a loss") / math.log(start / plain),
        {
            "dominant end / branch point": dominant / start,
            "plain end / branch point": plain / start,
        },
    )


def measure_bulk_ratio(seed: SeedTables) -> Measurement:
    """Worst over horizons of L_bulk / L_plain, paired step by step: a geometric mean per window.

    Infinite where the bulk branch diverges and the plain one does not.
    """
    steps, plain = measured(seed, "plain", "loss")
    try:
        bulk_steps, bulk = measured(seed, "bulk", "loss")
    except NonFiniteError as error:
        return Measurement(math.inf, note=str(error))
    require_same_start(seed, "plain", "bulk")
    common, of_plain, of_bulk = np.intersect1d(steps, bulk_steps, return_indices=True)
    if min(plain.min(), bulk.min()) <= 0:
        raise NotMeasurableError("a loss of zero has no logarithm")
    log_ratios = np.log(bulk[of_bulk] / plain[of_plain])
    length = common[-1] - common[0]
    ratios: dict[str, float] = {}
    for horizon in HORIZONS:
        end = common[0] + horizon * length
        window = (common <= end) & (common > end - HORIZON_WINDOW * length)
        if not window.any():
            raise NotMeasurableError(f"no loss was measured near step {end:.0f}")
        ratios[f"ratio at {horizon:.0%} of the branch"] = math.exp(log_ratios[window].mean())
    return Measurement(max(ratios.values()), ratios)


def measure_travel(seed: SeedTables) -> Measurement:
    """norm(theta - theta_0) of the bulk branch / of the dominant one, theta_0 the branch point.

    Each is a mean over the last tenth of the branch.
    """
    require_same_start(seed, "dominant", "bulk")
    distances: dict[str, float] = {}
    for role in ("dominant", "bulk"):
        _, dominant, bulk = measured(seed, role, "displacement_dominant", "displacement_bulk")
        distances[role] = last_tenth(np.hypot(dominant, bulk))
    beside = {f"distance of the {role} branch": value for role, value in distances.items()}
    return Measurement(ratio(distances["bulk"], distances["dominant"], "a distance"), beside)


def measure_climb(seed: SeedTables) -> Measurement:
    """Loss of the dominant branch over its last tenth / at the branch point."""
    start, end = start_and_end(seed, "dominant")
    return Measurement(ratio(end, start, "a loss"))


def measure_generalization(seed: SeedTables) -> Measurement:
    """Test accuracy over the last tenth, bulk branch - plain branch."""
    require_same_start(seed, "plain", "bulk")
    plain, bulk = (start_and_end(seed, role, "test_accuracy")[1] for role in ("plain", "bulk"))
    return Measurement(bulk - plain, {"plain branch": plain, "bulk branch": bulk})


claims.add_named(
    Claim(
        name="gradient-aligns",
        statement="The gradient of the training loss lies almost wholly in the dominant subspace.",
        source="Song, Ahn, Yun 2025, section 3; Gur-Ari, Roberts, Dyer 2018",
        statistic="chi_k of the full gradient, mean over the last half of the plain branch",
        measure=late_mean("alignment_gradient"),
        rule=Rule(0.9, "above"),
        refuted_by="k random directions give sqrt(k / P): about 0.02 for 17,610 parameters",
        needs_roles=("plain",),
        needs_columns=("alignment_gradient",),
    )
)

claims.add_named(
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

claims.add_named(
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

# Twice as far: a factor that neither branch's noise alone can make, far below what is seen.
claims.add_named(
    Claim(
        name="bulk-travels",
        statement="Updates in the bulk lead much farther from the branch point than dominant ones.",
        source="Song, Ahn, Yun 2025, section 3: Dom-SGD oscillates, Bulk-SGD moves on",
        statistic="distance from the branch point at the end, bulk branch / dominant branch",
        measure=measure_travel,
        rule=Rule(2.0, "above"),
        refuted_by="least squares whose Hessian has rank k: there only the dominant branch moves",
        needs_roles=("dominant", "bulk"),
        needs_columns=("loss", "displacement_dominant", "displacement_bulk"),
        logarithmic=True,
    )
)

# The paper says that the loss stalls; that it climbs was seen in one seed each elsewhere.
claims.add_named(
    Claim(
        name="dominant-climbs",
        statement="The loss of the dominant branch ends above the loss at the branch point.",
        source="replications of Song, Ahn, Yun 2025 (one seed each); the paper says that it stalls",
        statistic="loss of the dominant branch, last tenth / branch point",
        measure=measure_climb,
        rule=Rule(1.0, "above"),
        refuted_by="a dominant branch that continues to lower the loss, however slowly",
        needs_roles=("dominant",),
        needs_columns=("loss",),
        logarithmic=True,
    )
)

# Two samples in a hundred: about the standard error of the accuracy on 360 held-out digits.
claims.add_named(
    Claim(
        name="bulk-generalizes",
        statement="Without the dominant part of its updates, SGD classifies held-out data as well.",
        source="a question of the reviewers of Song, Ahn, Yun 2025, which measures training loss",
        statistic="test accuracy over the last tenth, bulk branch - plain branch",
        measure=measure_generalization,
        rule=Rule(-0.02, "above"),
        refuted_by="a bulk branch that fits the training data and loses accuracy on held-out data",
        needs_roles=("plain", "bulk"),
        needs_columns=("loss", "test_accuracy"),
    )
)
