"""Do the blocks of a Transformer differ in sharpness as published, and do their own rates pay?

The average sharpness of a block is the trace of its Hessian over its number of parameters.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np

from thalweg.analysis.claims.claim import Claim, Measurement, Rule, SeedTables
from thalweg.analysis.claims.statistics import end_ratio, late_half
from thalweg.analysis.quantities import BLOCKS
from thalweg.registry import claims

COLUMNS = tuple(f"block_sharpness_{block}" for block in BLOCKS)


def measure_order(seed: SeedTables) -> Measurement:
    """Kendall's tau between the published order and that measured, mean over the last half.

    Of each measurement: the part of the pairs of blocks in the published order less the part in the
    opposite one. Beside it, the mean average sharpness of each block.
    """
    values = np.stack(late_half(seed, "plain", *COLUMNS))
    signs = [np.sign(values[j] - values[i]) for i, j in combinations(range(len(values)), 2)]
    means = {block: float(row.mean()) for block, row in zip(BLOCKS, values, strict=True)}
    return Measurement(float(np.mean(signs)), means)


# Of ten pairs of blocks one reversed gives 0.8, two give 0.6: the number is in between.
claims.add_named(
    Claim(
        name="blocks-in-order",
        statement="The average sharpness rises from embedding over query-key, feed-forward and "
        "value-output to norm.",
        source="Wang et al. 2025, arXiv 2502.19002: GPT-2 and LLaMA, early and throughout",
        statistic="Kendall's tau of the five blocks' average sharpness with the published order, "
        "mean over the last half",
        measure=measure_order,
        rule=Rule(0.7, "above"),
        refuted_by="blocks of equal sharpness, or in another order: tau is 0 for a random one",
        needs_roles=("plain",),
        needs_columns=COLUMNS,
    )
)

claims.add_named(
    Claim(
        name="blockwise-rates-are-faster",
        statement="Learning rates by block lower the loss further in as many steps.",
        source="Wang et al. 2025, arXiv 2502.19002: AdamW in about half the steps",
        statistic="training loss over the last tenth, blockwise / plain branch",
        measure=end_ratio("loss", "blockwise", "plain"),
        rule=Rule(1.0, "below"),
        refuted_by="rates by block that leave the loss where one rate does, at the best such rate",
        needs_roles=("plain", "blockwise"),
        needs_columns=("loss",),
        logarithmic=True,
    )
)
