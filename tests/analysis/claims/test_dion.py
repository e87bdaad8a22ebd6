from __future__ import annotations

import pandas as pd
import pytest

from tests.analysis.claims.branches import falling, table, verdict_of

ROLES = {"full": "muon", "low": "dion-quarter"}


def pair(ratio: float, spread: float = 0.01) -> pd.DataFrame:
    return table(spread, muon={"loss": falling(0.1)}, dion_quarter={"loss": falling(0.1 * ratio)})


@pytest.mark.parametrize(
    ("outcome", "ratio"), [("holds", 0.9), ("holds", 1.03), ("does not hold", 1.5)]
)
def test_a_low_rank_may_cost_a_tenth_of_the_loss(outcome: str, ratio: float) -> None:
    verdict = verdict_of("low-rank-suffices", pair(ratio), **ROLES)
    assert verdict.outcome == outcome, verdict
    assert verdict.mean == pytest.approx(ratio, rel=0.03)


def test_seeds_that_disagree_leave_it_open() -> None:
    assert verdict_of("low-rank-suffices", pair(1.1, spread=0.2), **ROLES).outcome == "undecided"
