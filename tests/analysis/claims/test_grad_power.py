from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from tests.analysis.claims.branches import falling, table, verdict_of

ROLES = {"plain": "adam", "powered": "adam-power"}


def pair(ratio: float, start: float = 1.0) -> pd.DataFrame:
    """Losses that fall geometrically from 1, that with powers to `ratio` times the other."""
    return table(
        adam={"loss": falling(0.1)}, adam_power={"loss": falling(0.1 * ratio, start=start)}
    )


@pytest.mark.parametrize(
    ("outcome", "ratio"), [("holds", 0.8), ("does not hold", 1.2), ("undecided", 1.0)]
)
def test_powers_lower_the_loss_or_not(outcome: str, ratio: float) -> None:
    verdict = verdict_of("grad-power-lowers-loss", pair(ratio), **ROLES)
    assert verdict.outcome == outcome, verdict
    # The last tenth of the 41 rows: five.
    part = np.arange(36, 41) / 40
    expected = np.mean((0.1 * ratio) ** part) / np.mean(0.1**part)
    assert verdict.mean == pytest.approx(float(expected), rel=1e-3)


def test_branches_that_start_apart_are_not_compared() -> None:
    verdict = verdict_of("grad-power-lowers-loss", pair(0.8, start=0.5), **ROLES)
    assert verdict.outcome == "undecided"
    assert "start at different losses" in verdict.note
