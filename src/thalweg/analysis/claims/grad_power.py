"""Do powers of the gradient lower the loss that an optimizer reaches, its settings as they were?"""

from __future__ import annotations

from thalweg.analysis.claims.claim import Claim, Rule
from thalweg.analysis.claims.statistics import end_ratio

GRAD_POWER_CLAIMS = (
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
    ),
)
