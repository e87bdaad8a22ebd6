"""Do orthonormal updates need their full rank?

The source compares its method with Muon, and ranks with each other, by loss over steps. How much
more loss is as much as to say that low rank does not suffice is our choice: a tenth.
"""

from __future__ import annotations

from thalweg.analysis.claims.claim import Claim, Rule
from thalweg.analysis.claims.statistics import end_ratio

DION_CLAIMS = (
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
    ),
)
