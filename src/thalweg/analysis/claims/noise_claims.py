"""Is the alignment made by mini-batch noise? Branches that differ in their noise alone.

At a small learning rate the noise kicks the parameters up the steep walls of the valley, and the
gradient points back down: it is aligned because of where the noise has put it. Roles: `noisy` has
the mini-batch noise, `calm` takes the full gradient at the same learning rate.
"""

from __future__ import annotations

import math

from thalweg.analysis.claims.claim import Claim, Measurement, NonFiniteError, Rule, SeedTables
from thalweg.analysis.claims.statistics import (
    late_ratio,
    ratio,
    require_progress,
    require_same_start,
    start_and_end,
    whole_mean,
)
from thalweg.registry import claims


def measure_calm_loss(seed: SeedTables) -> Measurement:
    """Loss over the last tenth, calm branch / noisy branch; infinite where the calm one diverges.

    Not measurable where the noisy branch makes no progress: a calm branch that stands still would
    do as well.
    """
    require_progress(seed, "noisy")
    _, noisy = start_and_end(seed, "noisy")
    try:
        start, calm = start_and_end(seed, "calm")
    except NonFiniteError as error:
        return Measurement(math.inf, note=str(error))
    require_same_start(seed, "noisy", "calm")
    return Measurement(
        ratio(calm, noisy, "a loss"),
        {"calm end / branch point": calm / start, "noisy end / branch point": noisy / start},
    )


# One claim for two comparisons: from the initial parameters (the alignment never comes about)
# and from an aligned checkpoint (it goes away). 0.8 is far outside of what chi fluctuates by.
claims.add_named(
    Claim(
        name="alignment-is-noise",
        statement="Without mini-batch noise, small steps do not align: the gradient leaves the "
        "dominant subspace.",
        source="Song, Ahn, Yun 2025, on stochastic noise: SGD against GD at one learning rate",
        statistic="chi_k of the full gradient over the last half, calm branch / noisy branch",
        measure=late_ratio("alignment_gradient", "calm", "noisy"),
        rule=Rule(0.8, "below"),
        refuted_by="GD at the edge of stability, which aligns without any noise",
        needs_roles=("noisy", "calm"),
        needs_columns=("loss", "alignment_gradient"),
        logarithmic=True,
    )
)

claims.add_named(
    Claim(
        name="calm-keeps-falling",
        statement="While the alignment goes away, the loss continues to fall as far as with noise.",
        source="Song, Ahn, Yun 2025, on stochastic noise: SGD switched to GD",
        statistic="loss over the last tenth, calm branch / noisy branch",
        measure=measure_calm_loss,
        rule=Rule(1.05, "below"),
        refuted_by="a calm branch that stays at the loss of the branch point",
        needs_roles=("noisy", "calm"),
        needs_columns=("loss",),
        logarithmic=True,
    )
)

claims.add_named(
    Claim(
        name="alignment-returns",
        statement="Where the mini-batch noise is switched on again, the alignment is back.",
        source="Song, Ahn, Yun 2025, on stochastic noise: GD switched to SGD",
        statistic="chi_k of the full gradient over the last half, returned branch / noisy branch",
        measure=late_ratio("alignment_gradient", "returned", "noisy", same_start=False),
        rule=Rule(0.9, "above"),
        refuted_by="a returned branch that stays as little aligned as the calm one",
        needs_roles=("noisy", "returned"),
        needs_columns=("alignment_gradient",),
        logarithmic=True,
        same_end=False,
    )
)

# A half: more of the noise lies in the k directions than in all of the P - k others.
claims.add_named(
    Claim(
        name="noise-is-dominant",
        statement="Most of the variance of the mini-batch gradient lies in the dominant subspace.",
        source="Song, Ahn, Yun 2025, on stochastic noise: largest along dominant directions",
        statistic="fraction of the mini-batch gradient's variance in S_k, mean over the plain "
        "branch",
        measure=whole_mean("noise_share_dominant"),
        rule=Rule(0.5, "above"),
        refuted_by="isotropic noise has the fraction k / P, below 0.001 in every study here",
        needs_roles=("plain",),
        needs_columns=("noise_share_dominant",),
    )
)

claims.add_named(
    Claim(
        name="noise-inside-aligns",
        statement="Noise inside the dominant subspace aligns the gradient, noise outside does not.",
        source="a test of the cause that Song, Ahn, Yun 2025 give, on stochastic noise",
        statistic="chi_k of the full gradient over the last half, noise outside / noise inside",
        measure=late_ratio("alignment_gradient", "outside", "inside"),
        rule=Rule(0.7, "below"),
        refuted_by="noise that aligns the gradient wherever it is put",
        needs_roles=("inside", "outside"),
        needs_columns=("loss", "alignment_gradient"),
        logarithmic=True,
    )
)

claims.add_named(
    Claim(
        name="larger-batches-align-less",
        statement="The larger the batch, and the smaller its noise, the less the gradient aligns.",
        source="a question of the readers of Song, Ahn, Yun 2025; follows from its cause",
        statistic="chi_k of the full gradient over the last half, large batches / small batches",
        measure=late_ratio("alignment_gradient", "large", "small"),
        rule=Rule(0.9, "below"),
        refuted_by="a large learning rate, at which GD itself aligns: chi does not depend on the "
        "batch",
        needs_roles=("small", "large"),
        needs_columns=("loss", "alignment_gradient"),
        logarithmic=True,
    )
)
