from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.analysis import synthetic
from tests.analysis.claims.branches import change, falling, table, verdict_of
from thalweg import registry
from thalweg.analysis.claims import judge


@pytest.fixture(scope="module")
def study() -> pd.DataFrame:
    return synthetic.study()


# Cases built so that a claim is false.


def test_random_directions_do_not_align() -> None:
    verdict = judge(registry.claims["gradient-aligns"], synthetic.random_directions())
    assert verdict.outcome == "does not hold"
    assert verdict.mean == pytest.approx(math.sqrt(synthetic.K / synthetic.PARAMETERS), rel=0.1)


def test_on_least_squares_of_rank_k_the_dominant_branch_is_the_plain_one() -> None:
    verdict = judge(registry.claims["dominant-stalls"], synthetic.least_squares())
    assert verdict.outcome == "does not hold"
    assert verdict.mean == pytest.approx(1.0, abs=1e-9)


def test_on_least_squares_of_rank_k_the_bulk_branch_stands_still() -> None:
    verdict = judge(registry.claims["bulk-suffices"], synthetic.least_squares())
    assert verdict.outcome == "does not hold"
    assert verdict.mean > 10


def test_a_bulk_branch_that_falls_behind_late_is_found_at_the_last_horizon(
    study: pd.DataFrame,
) -> None:
    late = (study["branch"] == "bulk-sgd") & (study["step"] > 1000)
    data = change(study, late, "loss", study.loc[late, "loss"] * 1.4)
    verdict = judge(registry.claims["bulk-suffices"], data)
    assert verdict.outcome == "does not hold"
    assert verdict.beside["ratio at 25% of the branch"] < 1.05


def test_a_dominant_branch_that_climbs_makes_negative_progress(study: pd.DataFrame) -> None:
    later = (study["branch"] == "dom-sgd") & (study["step"] > 500)
    data = change(study, later, "loss", study.loc[later, "loss"] * 1.5)
    verdict = judge(registry.claims["dominant-stalls"], data)
    assert verdict.outcome == "holds"
    assert verdict.mean < -0.5


def test_a_bulk_branch_that_diverges_refutes_its_claim(study: pd.DataFrame) -> None:
    lost = (study["branch"] == "bulk-sgd") & (study["step"] > 800) & (study["seed"] == 0)
    verdict = judge(registry.claims["bulk-suffices"], change(study, lost, "loss", np.nan))
    assert verdict.outcome == "does not hold"
    assert math.isinf(verdict.mean)
    assert "seed 0: loss of bulk-sgd becomes non-finite after step 800" in verdict.note


def test_branches_from_different_checkpoints_are_not_compared(study: pd.DataFrame) -> None:
    first = (study["branch"] == "dom-sgd") & (study["step"] == 500)
    verdict = judge(registry.claims["dominant-stalls"], change(study, first, "loss", 0.2))
    assert verdict.outcome == "undecided"
    assert "different losses" in verdict.note


def test_a_plain_branch_without_progress_decides_nothing(study: pd.DataFrame) -> None:
    still = study["branch"].isin(["sgd", "dom-sgd"])
    verdict = judge(registry.claims["dominant-stalls"], change(study, still, "loss", 0.12))
    assert verdict.outcome == "undecided"
    assert "no decrease to compare with" in verdict.note


# The claims of the issue beside these.


def travelled(dominant: float, bulk: float) -> pd.DataFrame:
    """Dom moves inside S_k by `dominant` from the branch point, Bulk outside of it by `bulk`."""
    return table(
        dom_sgd={
            "loss": 1.0,
            "displacement_dominant": lambda part: dominant * part**0.1,
            "displacement_bulk": 0.3 * dominant,
        },
        bulk_sgd={
            "loss": falling(0.5),
            "displacement_dominant": 0.4 * bulk,
            "displacement_bulk": lambda part: 0.3 * bulk * part,
        },
    )


def test_the_distances_are_of_both_parts_together() -> None:
    verdict = verdict_of("bulk-travels", travelled(dominant=0.1, bulk=2.0))
    assert verdict.outcome == "holds"
    assert verdict.beside["distance of the dominant branch"] == pytest.approx(
        math.hypot(0.1, 0.03), rel=0.01
    )
    assert verdict.beside["distance of the bulk branch"] == pytest.approx(
        math.hypot(0.8, 0.6), rel=0.05
    )


@pytest.mark.parametrize(
    ("outcome", "ratio"), [("holds", 2.5), ("does not hold", 1.5), ("undecided", 2.0)]
)
def test_the_bulk_branch_travels_twice_as_far_or_not(outcome: str, ratio: float) -> None:
    columns = {"loss": 1.0, "displacement_bulk": 0.0}
    data = table(
        dom_sgd={**columns, "displacement_dominant": 0.1},
        bulk_sgd={**columns, "displacement_dominant": 0.1 * ratio},
    )
    verdict = verdict_of("bulk-travels", data)
    assert verdict.outcome == outcome
    assert verdict.mean == pytest.approx(ratio)


def test_on_least_squares_of_rank_k_only_the_dominant_branch_moves() -> None:
    still = {"displacement_dominant": 0.0, "displacement_bulk": 0.0}
    data = table(
        dom_sgd={"loss": falling(0.5), **still, "displacement_dominant": 1.0},
        bulk_sgd={"loss": 1.0, **still},
    )
    verdict = verdict_of("bulk-travels", data)
    assert verdict.outcome == "does not hold"
    assert verdict.mean == 0


@pytest.mark.parametrize(
    ("outcome", "end"), [("holds", 1.5), ("does not hold", 0.8), ("undecided", 1.0)]
)
def test_the_dominant_branch_climbs_or_not(outcome: str, end: float) -> None:
    verdict = verdict_of("dominant-climbs", table(dom_sgd={"loss": falling(end)}))
    assert verdict.outcome == outcome
    assert verdict.mean == pytest.approx(end, rel=0.03)


def test_dom_sgd_on_least_squares_of_rank_k_does_not_climb() -> None:
    assert (
        judge(registry.claims["dominant-climbs"], synthetic.least_squares()).outcome
        == "does not hold"
    )


@settings(max_examples=5, deadline=None)
@given(unit=st.floats(1e-6, 1e6))
def test_the_unit_of_the_loss_does_not_matter(unit: float) -> None:
    data = table(
        sgd={"loss": falling(0.5)}, dom_sgd={"loss": falling(1.1)}, bulk_sgd={"loss": falling(0.6)}
    )
    for name in ("dominant-stalls", "bulk-suffices", "dominant-climbs"):
        scaled = judge(registry.claims[name], data.assign(loss=unit * data["loss"]))
        assert scaled.mean == pytest.approx(judge(registry.claims[name], data).mean)


@pytest.mark.parametrize(
    ("outcome", "accuracy"), [("holds", 0.93), ("does not hold", 0.8), ("undecided", 0.9)]
)
def test_the_bulk_branch_generalizes_or_not(outcome: str, accuracy: float) -> None:
    data = table(
        sgd={"loss": falling(0.5), "test_accuracy": 0.92},
        bulk_sgd={"loss": falling(0.5), "test_accuracy": accuracy},
        spread=0.002,
    )
    verdict = verdict_of("bulk-generalizes", data)
    assert verdict.outcome == outcome
    assert verdict.mean == pytest.approx(accuracy - 0.92, abs=1e-3)
