"""Is the finding about the dominant subspace itself, and does the way it is found matter?"""

from __future__ import annotations

from thalweg.analysis.claims.claim import Claim, Measurement, Rule, SeedTables
from thalweg.analysis.claims.statistics import (
    late_ratio,
    log_ratio,
    require_same_start,
    start_and_end,
)
from thalweg.registry import claims

#: Below this log-decrease of the loss, 2 % of the loss itself is allowed: 0.02 = 0.1 * 0.2.
SMALL_DECREASE = 0.2


def measure_tracking(seed: SeedTables) -> Measurement:
    """abs(log(L_tracked / L_exact)) / max(log(L_0 / L_exact), 0.2), L_0 at the branch point.

    The difference as a part of the progress made. A branch without progress, such as a dominant
    one, has none to compare with: there a difference of 0.02 in the logarithm meets the rule.
    """
    require_same_start(seed, "exact", "tracked")
    start, exact = start_and_end(seed, "exact")
    _, tracked = start_and_end(seed, "tracked")
    decrease = log_ratio(start, exact, "a loss")
    difference = log_ratio(tracked, exact, "a loss")
    return Measurement(
        abs(difference) / max(decrease, SMALL_DECREASE),
        {"log(tracked / exact)": difference, "log(branch point / exact)": decrease},
    )


claims.add_named(
    Claim(
        name="control-does-not-align",
        statement="Another subspace of the same dimension does not hold the gradient.",
        source="a control of Song, Ahn, Yun 2025: what holds of any k directions is no finding",
        statistic="chi_k of the full gradient over the last half, control / dominant subspace",
        measure=late_ratio("alignment_gradient", "control", "plain"),
        rule=Rule(0.5, "below"),
        refuted_by="a subspace that holds the dominant directions, such as S_2k: the ratio is 1",
        needs_roles=("plain", "control"),
        needs_columns=("loss", "alignment_gradient"),
        logarithmic=True,
    )
)

claims.add_named(
    Claim(
        name="tracked-equals-exact",
        statement="Following the subspace gives the branch that solving it at every step gives.",
        source="a check of Thalweg's own: the tracker against a converged basis at every step",
        statistic="difference of the log-losses at the end / log-decrease of the exact branch",
        measure=measure_tracking,
        rule=Rule(0.1, "below"),
        refuted_by="a basis that lags behind: part of the dominant update stays in the bulk",
        needs_roles=("exact", "tracked"),
        needs_columns=("loss",),
    )
)
