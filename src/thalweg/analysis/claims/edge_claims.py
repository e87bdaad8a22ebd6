"""What happens at the edge of stability, where the sharpness meets what the steps can bear?

Full-batch methods: the sharpness rises until the method becomes unstable, then hovers there.
"""

from __future__ import annotations

import math

from thalweg.analysis.claims.claim import Claim, Measurement, NotMeasurableError, Rule, SeedTables
from thalweg.analysis.claims.statistics import (
    end_ratio,
    late_deviation,
    log_ratio,
    measured,
    ratio,
    require_same_start,
)
from thalweg.registry import claims

#: The learning rate times the sharpness at which gradient descent on a quadratic becomes unstable.
EDGE_OF_GRADIENT_DESCENT = 2.0
#: Logarithm: the bulk branch must lower its loss by 0.5 % at least over its last half.
LEAST_BULK_DECREASE = 0.005


def measure_sharpening(seed: SeedTables) -> Measurement:
    """Largest sharpness in the last quarter of the trunk's steps / sharpness at its first row."""
    steps, sharpness = measured(seed, "trunk", "sharpness")
    late = steps >= steps[0] + 0.75 * (steps[-1] - steps[0])
    first, largest = float(sharpness[0]), float(sharpness[late].max())
    return Measurement(
        ratio(largest, first, "a sharpness"),
        {"first sharpness": first, "largest late sharpness": largest},
    )


def measure_standstill(seed: SeedTables) -> Measurement:
    """Log-fall of the lowest loss from first to second half, dominant branch / bulk branch.

    At the edge a loss holds an oscillation between the walls, which grows and dies down. The lowest
    loss of each half shows the floor below it.
    """
    require_same_start(seed, "dominant", "bulk")
    falls = {role: _fall_of_the_floor(seed, role) for role in ("dominant", "bulk")}
    if falls["bulk"] < LEAST_BULK_DECREASE:
        raise NotMeasurableError(
            f"the loss of {seed.names['bulk']} falls by a factor of "
            f"{math.exp(falls['bulk']):.3g} only: no decrease to compare with"
        )
    return Measurement(
        falls["dominant"] / falls["bulk"],
        {f"log-fall of {seed.names[role]}": fall for role, fall in falls.items()},
    )


def _fall_of_the_floor(seed: SeedTables, role: str) -> float:
    steps, loss = measured(seed, role, "loss")
    early = steps <= (steps[0] + steps[-1]) / 2
    return log_ratio(float(loss[early].min()), float(loss[~early].min()), "a loss")


claims.add_named(
    Claim(
        name="dominant-stands-still",
        statement="Along the dominant directions alone, gradient descent oscillates between the "
        "walls and gets no deeper, while along the bulk alone the loss continues to fall.",
        source="Song, Ahn, Yun 2025, on the edge of stability",
        statistic="log-fall of the lowest loss from the first to the last half, dominant branch / "
        "bulk branch",
        measure=measure_standstill,
        rule=Rule(0.1, "below"),
        refuted_by="least squares whose Hessian has rank k: there the bulk branch stands still",
        needs_roles=("bulk", "dominant"),
        needs_columns=("loss",),
    )
)

claims.add_named(
    Claim(
        name="sharpness-hovers",
        statement="Gradient descent with a large learning rate holds the sharpness at 2 / lr.",
        source="Cohen et al. 2021, section 3; Song, Ahn, Yun 2025, on the edge of stability",
        statistic="distance of lr * sharpness / 2 from 1, mean over the last half of the branch",
        measure=late_deviation("lr_sharpness", EDGE_OF_GRADIENT_DESCENT),
        rule=Rule(0.1, "below"),
        refuted_by="a small learning rate, whose sharpness stays well below 2 / lr",
        needs_roles=("plain",),
        needs_columns=("lr_sharpness",),
    )
)

# Wider than for plain GD: the thresholds are those of a quadratic with constant gradient norm
# (SAM) or constant preconditioner (Adam), and both change along the branch.
claims.add_named(
    Claim(
        name="threshold-holds",
        statement="The sharpness that the optimizer feels hovers at its own stability threshold.",
        source="Cohen et al. 2022, section 3 (Adam); Long and Bartlett 2024 (SAM)",
        statistic="distance of sharpness / threshold from 1, mean over the last half of the branch",
        measure=late_deviation("stability_ratio", 1.0),
        rule=Rule(0.15, "below"),
        refuted_by="small steps or small batches, whose sharpness stays below the threshold",
        needs_roles=("plain",),
        needs_columns=("stability_ratio",),
    )
)

claims.add_named(
    Claim(
        name="progressive-sharpening",
        statement="Gradient descent raises the sharpness until it is at the edge.",
        source="Cohen et al. 2021, section 3.1",
        statistic="sharpness, largest in the trunk's last quarter / at its start",
        measure=measure_sharpening,
        rule=Rule(1.2, "above"),
        refuted_by="a quadratic loss, whose sharpness does not change",
        needs_roles=("trunk",),
        needs_columns=("sharpness",),
        logarithmic=True,
        same_end=False,
    )
)

claims.add_named(
    Claim(
        name="bulk-sharpens",
        statement="Without the dominant part, which holds it back, the sharpness continues to "
        "grow.",
        source="Song, Ahn, Yun 2025, on the edge of stability; Damian, Nichani, Lee 2023",
        statistic="sharpness over the last tenth, bulk branch / plain branch",
        measure=end_ratio("sharpness", "bulk", "plain"),
        rule=Rule(1.1, "above"),
        refuted_by="a quadratic loss, whose sharpness is the same for every branch",
        needs_roles=("plain", "bulk"),
        needs_columns=("loss", "sharpness"),
        logarithmic=True,
    )
)
