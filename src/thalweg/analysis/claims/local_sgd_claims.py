"""Does local SGD end in a flatter place than synchronous SGD, and is it as good on held-out data?

At one learning rate, from one checkpoint, with as many samples a step. Roles: `local` makes rounds
of local steps, `synchronous` takes the samples of all workers at every step.
"""

from __future__ import annotations

import numpy as np

from thalweg.analysis.claims.claim import Claim, Measurement, Rule, SeedTables
from thalweg.analysis.claims.statistics import (
    end_ratio,
    last_tenth,
    measured,
    ratio,
    require_progress,
    require_same_start,
    start_and_end,
)
from thalweg.registry import claims

SOURCE = "Gu, Lyu, Huang, Arora 2023, arXiv 2303.01215"


def measure_at_equal_loss(seed: SeedTables) -> Measurement:
    """Sharpness of the local branch at its end / of the synchronous one at the same loss.

    Sharpness rises as the loss falls, and local SGD is slower on the way: at equal steps a branch
    could be flatter for being behind. The synchronous sharpness is interpolated between the rows
    around that loss; where it never got so low, its last tenth counts.
    """
    require_same_start(seed, "synchronous", "local")
    require_progress(seed, "synchronous")
    _, loss, sharpness = measured(seed, "local", "loss", "sharpness")
    end_loss, end_sharpness = last_tenth(loss), last_tenth(sharpness)
    _, losses, others = measured(seed, "synchronous", "loss", "sharpness")
    lowest = np.minimum.accumulate(losses)
    if end_loss <= lowest[-1]:
        there = last_tenth(others)
    else:
        there = float(np.interp(-end_loss, -lowest, others))
    return Measurement(
        ratio(end_sharpness, there, "sharpness"),
        {
            "loss": end_loss,
            f"sharpness of {seed.names['local']}": end_sharpness,
            f"sharpness of {seed.names['synchronous']} there": there,
        },
    )


def measure_accuracy(seed: SeedTables) -> Measurement:
    """Test accuracy over the last tenth, local branch - synchronous branch."""
    require_same_start(seed, "synchronous", "local")
    synchronous, local = (
        start_and_end(seed, role, "test_accuracy")[1] for role in ("synchronous", "local")
    )
    return Measurement(
        local - synchronous,
        {
            f"end of {seed.names['synchronous']}": synchronous,
            f"end of {seed.names['local']}": local,
        },
    )


# A twentieth less at least: workers that never part are synchronous, and have the ratio 1.
claims.add_named(
    Claim(
        name="local-sgd-is-flatter",
        statement="Local SGD ends in a flatter place than synchronous SGD.",
        source=SOURCE,
        statistic="sharpness over the last tenth, local branch / synchronous branch",
        measure=end_ratio("sharpness", "local", "synchronous"),
        rule=Rule(0.95, "below"),
        refuted_by="full-batch gradients, with which workers never part: the ratio is 1",
        needs_roles=("synchronous", "local"),
        needs_columns=("loss", "sharpness"),
        logarithmic=True,
    )
)

claims.add_named(
    Claim(
        name="local-sgd-is-flatter-at-equal-loss",
        statement="Local SGD is flatter than synchronous SGD was at the same training loss.",
        source=f"a control for {SOURCE}",
        statistic="sharpness, local branch at its end / synchronous branch at the same loss",
        measure=measure_at_equal_loss,
        rule=Rule(0.95, "below"),
        refuted_by="a local branch on the same path, only behind: the ratio is 1",
        needs_roles=("synchronous", "local"),
        needs_columns=("loss", "sharpness"),
        logarithmic=True,
    )
)

# Of 360 held-out digits 0.01 are less than four.
claims.add_named(
    Claim(
        name="local-sgd-generalizes",
        statement="Local SGD is as good as synchronous SGD on held-out data.",
        source=SOURCE,
        statistic="test accuracy over the last tenth, local branch - synchronous branch",
        measure=measure_accuracy,
        rule=Rule(-0.01, "above"),
        refuted_by="rounds so long that the mean of the workers is worse than each of them",
        needs_roles=("synchronous", "local"),
        needs_columns=("loss", "test_accuracy"),
    )
)
