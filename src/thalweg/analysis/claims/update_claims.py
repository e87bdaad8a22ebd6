"""Does it pay to change the updates: the bulk part scaled up, powers of the gradient, low rank?

By loss after as many steps, and by steps to a loss; of a scaled bulk also where the curvature lies.
Zhou et al. report about half as many steps; we say "fewer" from three quarters on, half-way to no
gain. Of two ways to find the bulk one does about as well as the other where the loss decreases nine
tenths as far: a ratio of the losses themselves could hardly tell them apart in a short branch. How
much more loss says that low rank does not suffice is our choice too: a tenth.
"""

from __future__ import annotations

import numpy as np

from thalweg.analysis.claims.claim import Claim, Measurement, Rule, SeedTables
from thalweg.analysis.claims.statistics import (
    end_ratio,
    last_tenth,
    late_mean,
    measured,
    require_progress,
    require_same_start,
    start_and_end,
)
from thalweg.registry import claims

ZAKARIN = "Zakarin, Singh 2025, arXiv 2505.11972"
ZHOU = "Zhou, Wang, Chen, Cheng 2025, arXiv 2510.25244"


def measure_steps(seed: SeedTables) -> Measurement:
    """Steps to the plain branch's end loss, amplified / plain.

    That loss is the mean over the last tenth; it is reached where the loss first is as low. An
    amplified branch that never gets there counts with all of its steps: the ratio is then too low,
    and above 1 where it took as many as the plain one.
    """
    require_same_start(seed, "plain", "amplified")
    require_progress(seed, "plain")
    target = last_tenth(measured(seed, "plain", "loss")[1])
    needed: dict[str, float] = {}
    note = ""
    for role in ("plain", "amplified"):
        steps, losses = measured(seed, role, "loss")
        reached = np.flatnonzero(losses <= target)
        if not len(reached):
            note = f"{seed.names[role]} never reaches the loss"
        needed[role] = float(steps[reached[0] if len(reached) else -1] - steps[0])
    beside = {"loss": target} | {f"steps of {seed.names[r]}": needed[r] for r in needed}
    return Measurement(needed["amplified"] / needed["plain"], beside, note)


def measure_decrease(seed: SeedTables) -> Measurement:
    """Decrease of the training loss from the start to the last tenth, own batch / all data."""
    require_same_start(seed, "all-data", "own-batch")
    require_progress(seed, "all-data")
    decrease: dict[str, float] = {}
    for role in ("all-data", "own-batch"):
        start, end = start_and_end(seed, role)
        decrease[role] = start - end
    beside = {f"decrease of {seed.names[role]}": decrease[role] for role in decrease}
    return Measurement(decrease["own-batch"] / decrease["all-data"], beside)


claims.add_named(
    Claim(
        name="bulk-amplified-lowers-loss",
        statement="With the bulk part of its updates scaled up, or its dominant part down, the "
        "optimizer reaches a lower loss in as many steps.",
        source=f"{ZAKARIN}; {ZHOU}",
        statistic="training loss over the last tenth, amplified / plain",
        measure=end_ratio("loss", "amplified", "plain"),
        rule=Rule(1.0, "below"),
        refuted_by="factors of 1, which are the optimizer itself: the ratio is 1",
        needs_roles=("plain", "amplified"),
        needs_columns=("loss",),
        logarithmic=True,
    )
)

claims.add_named(
    Claim(
        name="bulk-amplified-saves-steps",
        statement="With the bulk part of its updates scaled up the optimizer needs three quarters "
        "of the steps, or fewer, to the loss at which it ends without.",
        source=f"{ZHOU} (language models, AdamW: about half)",
        statistic="steps to the loss over the plain branch's last tenth, amplified / plain",
        measure=measure_steps,
        rule=Rule(0.75, "below"),
        refuted_by="factors of 1, which are the optimizer itself: the ratio is 1",
        needs_roles=("plain", "amplified"),
        needs_columns=("loss",),
        logarithmic=True,
    )
)

claims.add_named(
    Claim(
        name="batch-hessian-suffices",
        statement="Bulk-SGD with the Hessian of each step's own mini-batch lowers the loss about "
        "as far as with that of all data.",
        source=f"{ZAKARIN}; the rule is ours",
        statistic="decrease of the training loss to the last tenth, own batch / all data",
        measure=measure_decrease,
        rule=Rule(0.9, "above"),
        refuted_by="mini-batches of one sample and k outputs: the gradient lies in the dominant "
        "space of the Gauss-Newton part",
        needs_roles=("all-data", "own-batch"),
        needs_columns=("loss",),
    )
)

for name, what, column in (
    ("gauss-newton", "the Gauss-Newton matrix", "energy_gauss_newton_dominant"),
    ("residual", "the residual Hessian", "energy_residual_dominant"),
):
    claims.add_named(
        Claim(
            name=f"{name}-energy-is-dominant",
            statement=f"Most of the curvature energy of {what} lies in the dominant subspace.",
            source=f"{ZAKARIN}; energy as a squared Frobenius norm: our reading",
            statistic="norm(P A P)^2 / norm(A)^2, mean over the last half",
            measure=late_mean(column),
            rule=Rule(0.5, "above"),
            refuted_by="random directions: about (k / P)^2",
            needs_roles=("plain",),
            needs_columns=(column,),
        )
    )

claims.add_named(
    Claim(
        name="grad-power-lowers-loss",
        statement="With powers of the gradient in its place the optimizer reaches a lower loss in "
        "as many steps, at the learning rate that is good without.",
        source="Wang et al. 2025, arXiv 2505.24275 (language models, p = 1.2)",
        statistic="training loss over the last tenth, with powers / without",
        measure=end_ratio("loss", "powered", "plain"),
        rule=Rule(1.0, "below"),
        refuted_by="a power of 1, which is the optimizer itself: the ratio is 1",
        needs_roles=("plain", "powered"),
        needs_columns=("loss",),
        logarithmic=True,
    )
)

claims.add_named(
    Claim(
        name="low-rank-suffices",
        statement="Orthonormal updates of low rank with error feedback reach the loss of full-rank "
        "ones in as many steps, up to a tenth.",
        source="Ahn, Xu, Abreu, Langford 2025, arXiv 2504.05295 (language models)",
        statistic="training loss over the last tenth, low rank / full rank",
        measure=end_ratio("loss", "low", "full"),
        rule=Rule(1.1, "below"),
        refuted_by="updates of low rank whose left-out part is lost: the loss stalls above",
        needs_roles=("full", "low"),
        needs_columns=("loss",),
        logarithmic=True,
    )
)
