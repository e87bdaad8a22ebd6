from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from tests.analysis.claims.branches import Column, falling, table, verdict_of

ROLES = {"synchronous": "sync", "local": "local"}
SYNC: dict[str, Column] = {
    "loss": falling(0.25),
    "sharpness": falling(16.0, 4.0),
    "test_accuracy": 0.95,
}


def branches(**local: Column) -> pd.DataFrame:
    return table(spread=0.001, sync=SYNC, local={**SYNC, **local})


@pytest.mark.parametrize(
    ("outcome", "end"), [("holds", 12.0), ("does not hold", 16.0), ("undecided", 15.2)]
)
def test_the_end_of_local_sgd_is_flatter_or_not(outcome: str, end: float) -> None:
    verdict = verdict_of("local-sgd-is-flatter", branches(sharpness=falling(end, 4.0)), **ROLES)
    assert verdict.outcome == outcome, verdict
    assert verdict.mean == pytest.approx(end / 16, rel=0.02)


def test_a_branch_that_is_only_behind_is_flatter_but_not_at_equal_loss() -> None:
    # Half of the way of the synchronous branch: loss 0.5 and sharpness 8 at its end.
    behind = branches(loss=falling(0.5), sharpness=falling(8.0, 4.0))
    assert verdict_of("local-sgd-is-flatter", behind, **ROLES).outcome == "holds"
    verdict = verdict_of("local-sgd-is-flatter-at-equal-loss", behind, **ROLES)
    assert verdict.outcome == "does not hold"
    assert verdict.mean == pytest.approx(1.0, rel=0.01)


def test_a_branch_on_a_flatter_path_is_flatter_at_equal_loss() -> None:
    # At loss 0.5 the synchronous branch has sharpness 8, this one 5.
    verdict = verdict_of(
        "local-sgd-is-flatter-at-equal-loss",
        branches(loss=falling(0.5), sharpness=falling(5.0, 4.0)),
        **ROLES,
    )
    assert verdict.outcome == "holds"
    assert verdict.mean == pytest.approx(5 / 8, rel=0.05)  # the end is a window


def test_where_the_other_never_got_so_low_its_end_counts() -> None:
    verdict = verdict_of(
        "local-sgd-is-flatter-at-equal-loss",
        branches(loss=falling(0.1), sharpness=falling(8.0, 4.0)),
        **ROLES,
    )
    assert verdict.mean == pytest.approx(8 / 16, rel=0.05)


@pytest.mark.parametrize(
    ("outcome", "accuracy"), [("holds", 0.96), ("does not hold", 0.92), ("undecided", 0.94)]
)
def test_the_accuracy_may_be_lower_by_one_in_a_hundred(outcome: str, accuracy: float) -> None:
    def late(part: np.ndarray) -> np.ndarray:
        return np.where(part < 0.85, 0.5, accuracy)

    verdict = verdict_of("local-sgd-generalizes", branches(test_accuracy=late), **ROLES)
    assert verdict.outcome == outcome, verdict
    assert verdict.mean == pytest.approx(accuracy - 0.95, abs=0.005)


@pytest.mark.parametrize(
    "claim",
    ["local-sgd-is-flatter", "local-sgd-is-flatter-at-equal-loss", "local-sgd-generalizes"],
)
def test_branches_of_different_checkpoints_say_nothing(claim: str) -> None:
    verdict = verdict_of(claim, branches(loss=falling(0.5, 2.0)), **ROLES)
    assert verdict.outcome == "undecided"
    assert "different losses" in verdict.note
