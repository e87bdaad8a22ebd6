"""What do momentum and adaptive steps change? Where an optimizer's speed comes from, in two parts.

The effective learning rate of a part Q is -<Q delta, Q g> / norm(Q g)^2 of the proposed update
delta: how far the update goes in Q, as a learning rate of plain gradient descent.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from thalweg.analysis.claims.claim import Claim, Measurement, NotMeasurableError, Rule, SeedTables
from thalweg.analysis.claims.statistics import late_half, measured, ratio
from thalweg.registry import claims


def branch_rate(seed: SeedTables, role: str, part: str) -> float:
    """Effective learning rate over a whole branch.

    part   dominant or bulk
    """
    from thalweg.measure.effective_learning_rate import effective_learning_rate

    _, *terms = measured(seed, role, f"lr_numerator_{part}", f"lr_denominator_{part}")
    rate = effective_learning_rate(*terms)
    if math.isnan(rate):
        raise NotMeasurableError(f"the {part} part of the gradient of {seed.names[role]} is zero")
    return rate


def measure_favour(seed: SeedTables) -> Measurement:
    """Effective learning rate of the bulk / of the dominant part: of `other` over that of `plain`.

    The second ratio takes out what the two parts have different under plain SGD already.
    """
    favours: dict[str, float] = {}
    rates: dict[str, float] = {}
    for role in ("plain", "other"):
        bulk, dominant = (branch_rate(seed, role, part) for part in ("bulk", "dominant"))
        favours[role] = ratio(bulk, dominant, f"effective learning rate of {seed.names[role]}")
        rates[f"bulk, {seed.names[role]}"] = bulk
        rates[f"dominant, {seed.names[role]}"] = dominant
    return Measurement(favours["other"] / favours["plain"], rates)


def own_metric_gain(column: str) -> Callable[[SeedTables], Measurement]:
    """Mean over the last half of chi_k in the optimizer's own metric - chi_k in the Euclidean one.

    Paired: only rows in which both were measured.
    """

    def measure(seed: SeedTables) -> Measurement:
        own, euclidean = late_half(seed, "plain", f"{column}_own_metric", column)
        means = {"own metric": float(own.mean()), "Euclidean metric": float(euclidean.mean())}
        return Measurement(means["own metric"] - means["Euclidean metric"], means)

    return measure


claims.add_named(
    Claim(
        name="favours-bulk",
        statement="The optimizer moves faster in the bulk, relative to the dominant part, than SGD "
        "does.",
        source="Song, Ahn, Yun 2025, section 6",
        statistic="effective learning rate, bulk / dominant part, of the other branch / of the "
        "plain one",
        measure=measure_favour,
        rule=Rule(1.5, "above"),
        refuted_by="SGD with another learning rate: it changes both parts alike, the ratio is 1",
        needs_roles=("plain", "other"),
        needs_columns=(
            "lr_numerator_dominant",
            "lr_denominator_dominant",
            "lr_numerator_bulk",
            "lr_denominator_bulk",
        ),
        logarithmic=True,
        same_end=False,
    )
)

claims.add_named(
    Claim(
        name="own-metric-aligns",
        statement="In the optimizer's own metric its update is more aligned than in the Euclidean "
        "one.",
        source="replications of Song, Ahn, Yun 2025 (Adam, one seed: 0.89 against 0.31); Cohen et "
        "al. 2022",
        # Of the update: Adam's gradient is about as aligned in either metric.
        statistic="chi_k of the proposed update, own - Euclidean metric, mean over the last half",
        measure=own_metric_gain("alignment_proposed"),
        rule=Rule(0.05, "above"),
        refuted_by="equal second moments of all parameters: both metrics are the same up to scale",
        needs_roles=("plain",),
        needs_columns=("alignment_proposed", "alignment_proposed_own_metric"),
    )
)
