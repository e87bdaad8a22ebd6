from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from tests.lab import toys
from thalweg import registry
from thalweg.analysis.claims.claim import Claim
from thalweg.analysis.claims.judgement import Verdict, judge
from thalweg.analysis.claims.statistics import rows_where

CLAIMS = {name: claim for name, claim in registry.claims.items() if name.startswith("valley-")}
ROLES = {"plain": "sgd", "dominant": "dom-sgd", "bulk": "bulk-sgd", "full-batch": "gd"}


@pytest.fixture(scope="module")
def study() -> pd.DataFrame:
    return toys.valley()


def judged(name: str, data: pd.DataFrame) -> Verdict:
    return judge(CLAIMS[name], data, ROLES)


@pytest.mark.parametrize("name", CLAIMS)
def test_both_claims_hold_in_the_valley(name: str, study: pd.DataFrame) -> None:
    verdict = judged(name, study)
    assert verdict.outcome == "holds", verdict
    assert verdict.note == ""


def test_the_numbers_are_those_of_the_closed_form(study: pd.DataFrame) -> None:
    """x of SGD has variance (lr c y)^2 / (1 - (1 - lr a)^2): its gradient is 41 y across."""
    aligns, advances = (
        judged("valley-noise-aligns", study),
        judged("valley-flat-part-advances", study),
    )
    assert aligns.beside["along the floor, GD"] == pytest.approx(1.0, abs=1e-6)
    spread = 1000 * 0.0005 * 60 / np.sqrt(0.75)
    draws = np.abs(np.random.default_rng(0).standard_normal(100_000)) * spread
    expected = np.mean(draws / np.hypot(draws, 1))
    assert aligns.beside["along the wall, SGD"] == pytest.approx(expected, abs=0.03)
    assert advances.beside["progress of dominant / plain"] == pytest.approx(0, abs=1e-9)


# Cases built so that a claim is false.


def test_without_a_coupling_the_gradient_of_sgd_points_along_the_floor() -> None:
    verdict = judged("valley-noise-aligns", toys.valley(coupling=0.0))
    assert verdict.outcome == "does not hold"
    assert verdict.beside["along the wall, SGD"] == pytest.approx(0, abs=1e-6)


def test_gd_that_bounces_too_refutes_the_alignment_by_noise(study: pd.DataFrame) -> None:
    data = study.copy()
    data.loc[data["branch"] == "gd", "alignment_gradient"] = 0.99
    assert judged("valley-noise-aligns", data).outcome == "does not hold"


def test_exchanged_branches_refute_the_progress_of_the_flat_part(study: pd.DataFrame) -> None:
    names = {"dom-sgd": "bulk-sgd", "bulk-sgd": "dom-sgd"}
    verdict = judged("valley-flat-part-advances", study.replace({"branch": names}))
    assert verdict.outcome == "does not hold"


def test_in_a_valley_turned_by_45_degrees_the_coordinate_says_nothing_of_progress() -> None:
    verdict = judged("valley-flat-part-advances", toys.valley(angle=np.pi / 4, steps=300))
    assert verdict.outcome != "holds"


def test_a_dominant_branch_that_advances_half_as_far_is_no_stalling(study: pd.DataFrame) -> None:
    data = study.copy()
    dominant = data["branch"] == "dom-sgd"
    data["position"] = [
        [0.0, float(np.exp(-0.00025 * step))] if of_dominant else position
        for of_dominant, step, position in zip(
            dominant, data["step"], data["position"], strict=True
        )
    ]
    assert judged("valley-flat-part-advances", data).outcome == "does not hold"


# Cases in which nothing can be said.


def test_sgd_that_stands_still_decides_nothing(study: pd.DataFrame) -> None:
    data = rows_where(study, "step", 0)
    verdict = judged("valley-flat-part-advances", data)
    assert verdict.outcome == "undecided"
    assert "does not advance along the floor" in verdict.note


def test_positions_that_were_not_measured_are_named(study: pd.DataFrame) -> None:
    data = study.copy()
    data["position"] = None
    verdict = judged("valley-flat-part-advances", data)
    assert verdict.outcome == "undecided"
    assert "position of sgd was not measured" in verdict.note


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_diverged_branches_never_make_a_claim_hold(value: float, study: pd.DataFrame) -> None:
    data = study.copy()
    lost = (data["step"] > 1000) & (data["branch"] != "gd")
    data.loc[lost, ["loss", "alignment_gradient"]] = value
    data["position"] = [
        [value, value] if gone else row for gone, row in zip(lost, data["position"], strict=True)
    ]
    for name in CLAIMS:
        verdict = judged(name, data)
        assert verdict.outcome != "holds"
        assert verdict.note


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=CLAIMS.keys())
def test_every_claim_says_what_would_refute_it_and_where_it_comes_from(claim: Claim) -> None:
    assert claim.refuted_by
    assert "2025" in claim.source
    assert claim.minimum_seeds == 3
