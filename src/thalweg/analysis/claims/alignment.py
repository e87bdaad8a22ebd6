"""What lies in the dominant subspace, and for how long is it the same subspace?

That the gradient lies in it is claimed with the main finding (`main_finding.py`).
"""

from __future__ import annotations

from thalweg.analysis.claims.claim import Claim, Rule
from thalweg.analysis.claims.statistics import late_mean

ALIGNMENT_CLAIMS = (
    # A half: a direction of the old subspace then lies more in the new one than outside of it. For
    # random subspaces the overlap is k / P, below 0.001 in every study here. The branch must start
    # from a trained checkpoint: the subspace of the initial parameters is another one.
    Claim(
        name="subspace-persists",
        statement="The dominant subspace stays much the same while training goes on.",
        source="Gur-Ari, Roberts, Dyer 2018, section 3",
        statistic="overlap of S_k with S_k at the branch point, trace(P P') / k, mean over the "
        "last half of the plain branch",
        measure=late_mean("overlap_branch_point"),
        rule=Rule(0.5, "above"),
        refuted_by="random subspaces of dimension k overlap by k / P",
        needs_roles=("plain",),
        needs_columns=("overlap_branch_point",),
    ),
    # 0.7: half of the update's squared length. Lower than for the gradient, since mini-batch noise
    # has a part in the bulk (chi of a mini-batch gradient is 0.8 where the full gradient has 0.96).
    Claim(
        name="update-aligns",
        statement="The optimizer's update, too, lies mostly in the dominant subspace.",
        source="Song, Ahn, Yun 2025, on sharpness-aware minimization, momentum and Adam",
        statistic="chi_k of the proposed update, mean over the last half of the plain branch",
        measure=late_mean("alignment_proposed"),
        rule=Rule(0.7, "above"),
        refuted_by="orthogonalized updates (Muon): all directions have equal weight, chi is 0.2",
        needs_roles=("plain",),
        needs_columns=("alignment_proposed",),
    ),
)
