from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from tests.analysis.claims.branches import falling, table, verdict_of, without


@pytest.mark.parametrize(
    ("outcome", "factor"),
    [("holds", 1.03), ("holds", 0.97), ("does not hold", 0.5), ("undecided", 1.1)],
)
def test_sharpness_hovers_where_lr_times_sharpness_is_near_2(outcome: str, factor: float) -> None:
    data = table(gd={"loss": falling(0.5), "lr_sharpness": 2 * factor}, spread=0.005)
    verdict = verdict_of("sharpness-hovers", data, plain="gd")
    assert verdict.outcome == outcome
    assert verdict.beside["mean of lr_sharpness"] == pytest.approx(2 * factor, rel=1e-3)


def test_an_oscillation_about_the_edge_averages_out() -> None:
    data = table(gd={"loss": falling(0.5), "lr_sharpness": lambda p: 2 + 0.5 * np.sin(300 * p)})
    assert verdict_of("sharpness-hovers", data, plain="gd").outcome == "holds"


@pytest.mark.parametrize(
    ("outcome", "ratio"), [("holds", 1.05), ("does not hold", 0.6), ("undecided", 0.85)]
)
def test_the_optimizers_own_threshold_holds_or_not(outcome: str, ratio: float) -> None:
    data = table(adam={"loss": falling(0.5), "stability_ratio": ratio})
    assert verdict_of("threshold-holds", data, plain="adam").outcome == outcome


@pytest.mark.parametrize(
    ("outcome", "end"), [("holds", 6.0), ("does not hold", 2.05), ("undecided", 2.4)]
)
def test_progressive_sharpening_compares_the_trunks_end_with_its_start(
    outcome: str, end: float
) -> None:
    data = table(trunk={"loss": falling(0.5), "sharpness": falling(end, 2.0)}, first=0)
    verdict = verdict_of("progressive-sharpening", data)
    assert verdict.outcome == outcome
    assert verdict.mean == pytest.approx(end / 2)


def test_a_trunk_that_was_sharp_only_before_its_last_quarter_does_not_sharpen() -> None:
    data = table(
        trunk={"sharpness": lambda part: np.where((part > 0.2) & (part < 0.7), 20.0, 2.0)}, first=0
    )
    assert verdict_of("progressive-sharpening", data).outcome == "does not hold"


def quadratic_descent() -> pd.DataFrame:
    """GD and Bulk-GD on a quadratic: one sharpness for all branches, seeds and steps."""
    columns = {"loss": falling(0.5), "sharpness": 4.0, "lr_sharpness": 0.4}
    return table(trunk=columns, gd=columns, bulk_gd=columns, spread=0.0)


@pytest.mark.parametrize(
    ("claim", "roles"),
    [
        ("sharpness-hovers", {"plain": "gd"}),
        ("progressive-sharpening", {}),
        ("bulk-sharpens", {"plain": "gd", "bulk": "bulk-gd"}),
    ],
)
def test_on_a_quadratic_with_small_steps_nothing_happens_to_the_sharpness(
    claim: str, roles: dict[str, str]
) -> None:
    assert verdict_of(claim, quadratic_descent(), **roles).outcome == "does not hold"


@pytest.mark.parametrize(
    ("outcome", "end"), [("holds", 6.0), ("does not hold", 4.0), ("undecided", 4.4)]
)
def test_the_bulk_branch_sharpens_or_not(outcome: str, end: float) -> None:
    data = table(
        gd={"loss": falling(0.5), "sharpness": 4.0},
        bulk_gd={"loss": falling(0.5), "sharpness": falling(end, 4.0)},
    )
    verdict = verdict_of("bulk-sharpens", data, plain="gd", bulk="bulk-gd")
    assert verdict.outcome == outcome
    assert verdict.mean == pytest.approx(end / 4, rel=0.05)


def test_a_diverged_bulk_branch_has_no_sharpness() -> None:
    data = table(
        gd={"loss": falling(0.5), "sharpness": 4.0},
        bulk_gd={"loss": falling(0.5), "sharpness": falling(9.0, 4.0)},
    )
    gone = (data["branch"] == "bulk-gd") & (data["step"] > 200)
    verdict = verdict_of(
        "bulk-sharpens", without(data, gone, "loss", "sharpness"), plain="gd", bulk="bulk-gd"
    )
    assert verdict.outcome == "undecided"
    assert "non-finite" in verdict.note


@pytest.mark.parametrize(
    ("outcome", "fall"), [("holds", 0.001), ("does not hold", 0.2), ("undecided", 0.01)]
)
def test_below_its_oscillation_the_dominant_branch_gets_deeper_or_not(
    outcome: str, fall: float
) -> None:
    def oscillating(part: np.ndarray) -> np.ndarray:
        return np.exp(-2 * fall * part) * (1 + 0.3 * np.sin(40 * np.pi * part) ** 2)

    falls = {"loss": lambda part: np.exp(-0.2 * part)}
    data = table(dom_gd={"loss": oscillating}, bulk_gd=falls, spread=0.0)
    if outcome == "undecided":
        later = (data["branch"] == "dom-gd") & (data["step"] > 200)
        data.loc[later, "loss"] *= np.exp(-0.008 * (data.loc[later, "seed"] - 1))
    verdict = verdict_of("dominant-stands-still", data, dominant="dom-gd", bulk="bulk-gd")
    assert verdict.outcome == outcome
    assert verdict.mean == pytest.approx(fall / 0.1, rel=0.05, abs=0.005)


def test_beside_a_bulk_branch_that_stands_still_nothing_is_said() -> None:
    still = table(dom_gd={"loss": falling(0.5)}, bulk_gd={"loss": 1.0}, spread=0.0)
    verdict = verdict_of("dominant-stands-still", still, dominant="dom-gd", bulk="bulk-gd")
    assert verdict.outcome == "undecided"
    assert "no decrease to compare with" in verdict.note
