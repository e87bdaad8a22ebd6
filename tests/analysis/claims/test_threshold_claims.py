from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from tests.analysis.claims.branches import change, falling, table, verdict_of, without

PLAIN = {"plain": "sgd"}


def with_shares(shares: list[float]) -> pd.DataFrame:
    """The plain branch with these shares of the gradient above the five thresholds."""
    data = table(sgd={"loss": falling(0.5)})
    data["gradient_shares"] = [shares if step % 20 == 0 else None for step in data["step"]]
    return data


@pytest.mark.parametrize(
    ("tenth", "outcome"), [(0.8, "holds"), (0.3, "does not hold"), (0.5, "holds")]
)
def test_most_of_the_gradient_is_judged_at_a_tenth(tenth: float, outcome: str) -> None:
    verdict = verdict_of(
        "gradient-above-threshold", with_shares([0.1, 0.2, tenth, 0.9, 0.95]), **PLAIN
    )
    assert verdict.outcome == outcome
    assert verdict.mean == pytest.approx(tenth)


def test_shares_of_the_first_half_count_for_nothing() -> None:
    data = with_shares([0.1, 0.2, 0.8, 0.9, 0.95])
    early = data["step"] < 200
    data["gradient_shares"] = [
        [0.0] * 5 if first and shares is not None else shares
        for first, shares in zip(early, data["gradient_shares"], strict=True)
    ]
    assert verdict_of("gradient-above-threshold", data, **PLAIN).mean == pytest.approx(0.8)


def test_shares_that_stop_are_no_shares() -> None:
    data = with_shares([0.1, 0.2, 0.8, 0.9, 0.95])
    data.loc[data["step"] > 200, "gradient_shares"] = None
    verdict = verdict_of("gradient-above-threshold", data, **PLAIN)
    assert verdict.outcome == "undecided"
    assert "non-finite" in verdict.note


def with_gap(share: float, chi: float = 0.9) -> pd.DataFrame:
    columns = {"alignment_gradient": chi, "gradient_share_at_gap": share, "gap_ratio": 0.2}
    return table(0.0, sgd={"loss": falling(0.5), **columns})


@pytest.mark.parametrize(
    ("share", "outcome"), [(0.82, "holds"), (0.7, "does not hold"), (0.9, "does not hold")]
)
def test_the_share_above_the_gap_is_chi_squared(share: float, outcome: str) -> None:
    verdict = verdict_of("share-equals-alignment", with_gap(share), **PLAIN)
    assert verdict.outcome == outcome
    assert verdict.mean == pytest.approx(abs(share - 0.81))


def test_without_a_gap_nothing_is_compared() -> None:
    data = change(with_gap(0.2), with_gap(0.2)["step"] > 0, "gap_ratio", 0.8)
    data = without(data, data["step"] > 0, "gradient_share_at_gap")
    verdict = verdict_of("share-equals-alignment", data, **PLAIN)
    assert verdict.outcome == "undecided"
    assert "no clear gap" in verdict.note
    assert "0.80" in verdict.note


def test_only_rows_with_a_gap_are_compared() -> None:
    data = with_gap(0.82)
    data = without(data, data["step"] > 220, "gradient_share_at_gap")
    verdict = verdict_of("share-equals-alignment", data, **PLAIN)
    assert verdict.outcome == "holds"
    assert verdict.beside["part of the rows with a gap"] == pytest.approx(5 / 21)


def bulk(end: float, plain: float = 0.5) -> pd.DataFrame:
    return table(sgd={"loss": falling(plain)}, bulk_sgd={"loss": falling(end)})


@pytest.mark.parametrize(
    ("end", "outcome"), [(0.5, "holds"), (0.6, "holds"), (0.9, "does not hold")]
)
def test_most_of_the_progress_is_a_half_of_the_log_decrease(end: float, outcome: str) -> None:
    verdict = verdict_of("progress-below-threshold", bulk(end), **PLAIN, bulk="bulk-sgd")
    assert verdict.outcome == outcome
    assert verdict.mean == pytest.approx(np.log(end) / np.log(0.5), abs=0.05)


def test_without_progress_there_are_no_parts_of_it() -> None:
    verdict = verdict_of("progress-below-threshold", bulk(0.9, 0.999), **PLAIN, bulk="bulk-sgd")
    assert verdict.outcome == "undecided"
    assert "no decrease" in verdict.note
