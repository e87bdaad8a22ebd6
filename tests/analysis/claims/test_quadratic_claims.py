from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pandas as pd
import pytest

from tests.lab import toys
from thalweg import registry
from thalweg.analysis.claims.claim import Claim, NotMeasurableError
from thalweg.analysis.claims.judgement import Verdict, judge
from thalweg.analysis.claims.quadratic_claims import log_odds, predicted_step_size
from thalweg.analysis.claims.statistics import rows_where
from thalweg.errors import InvalidInput

ROLES: Mapping[str, Mapping[str, str]] = {
    "alignment-phases": {"plain": "trunk"},
    "critical-step-size": {"small": "sgd-low", "large": "sgd-high"},
    "bulk-lowers-dominant-raises": {"dominant": "dom-between", "bulk": "bulk-between"},
    "critical-rates": toys.RATE_ROLES,
}
CLAIMS = {name: registry.claims[name] for name in ROLES}


@pytest.fixture(scope="module")
def study() -> pd.DataFrame:
    return toys.quadratic()


def judged(name: str, data: pd.DataFrame, **roles: str) -> Verdict:
    return judge(CLAIMS[name], data, {**ROLES[name], **roles})


def exchanged(data: pd.DataFrame, one: str, other: str) -> pd.DataFrame:
    """The table with the courses of two branches exchanged, each with its learning rate kept."""
    changed = data.copy()
    columns = ["loss", "alignment_gradient"]
    first, second = (data["branch"] == name for name in (one, other))
    changed.loc[first, columns] = data.loc[second, columns].to_numpy()
    changed.loc[second, columns] = data.loc[first, columns].to_numpy()
    return changed


@pytest.mark.parametrize("name", CLAIMS)
def test_every_claim_holds_on_the_quadratic(name: str, study: pd.DataFrame) -> None:
    verdict = judged(name, study)
    assert verdict.outcome == "holds", verdict
    assert verdict.note == ""


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=CLAIMS.keys())
def test_every_claim_says_what_would_refute_it_and_where_it_comes_from(claim: Claim) -> None:
    assert claim.refuted_by
    assert "2026" in claim.source
    assert claim.minimum_seeds == 3


def test_log_odds_are_the_logarithm_of_the_ratio_of_squared_parts() -> None:
    chi = np.array([0.6, 0.8])
    np.testing.assert_allclose(log_odds(chi), np.log([0.36 / 0.64, 0.64 / 0.36]), rtol=1e-12)
    with pytest.raises(NotMeasurableError, match="no log-odds"):
        log_odds(np.array([0.5, 1.0]))


def test_the_predicted_step_size_is_near_the_learning_rate_of_a_stationary_trunk(
    study: pd.DataFrame,
) -> None:
    """At stationarity it is lr_0, but for the bulk's own pace and the scatter of the moment."""
    rows = rows_where(study, "branch", "sgd-low")
    found = [predicted_step_size(rows_where(rows, "seed", n), "sgd-low") for n in range(3)]
    assert np.exp(np.mean(np.log(found))) == pytest.approx(toys.RATE, rel=0.35)


# Cases built so that a claim is false.


def test_without_noise_alignment_falls_and_does_not_come_back() -> None:
    data = toys.quadratic(noise=0.0, steps=60)
    assert judged("alignment-phases", data).outcome == "does not hold"


def test_from_the_floor_alignment_only_rises() -> None:
    data = toys.quadratic(radius=0.5)
    assert judged("alignment-phases", data).outcome == "does not hold"


def test_alignment_that_moves_against_the_prediction_refutes_it(study: pd.DataFrame) -> None:
    verdict = judged("critical-step-size", exchanged(study, "sgd-low", "sgd-high"))
    assert verdict.outcome == "does not hold"


def test_alignment_that_rises_at_both_rates_refutes_the_step_size(study: pd.DataFrame) -> None:
    low, high = (study["branch"] == name for name in ("sgd-low", "sgd-high"))
    data = study.copy()
    data.loc[low, "alignment_gradient"] = study.loc[high, "alignment_gradient"].to_numpy()
    assert judged("critical-step-size", data).outcome == "does not hold"


def test_exchanged_parts_refute_both_claims_on_the_loss(study: pd.DataFrame) -> None:
    data = exchanged(study, "dom-between", "bulk-between")
    assert judged("bulk-lowers-dominant-raises", data).outcome == "does not hold"
    assert judged("critical-rates", data).outcome == "does not hold"


@pytest.mark.parametrize("branch", list(toys.RATE_ROLES.values()))
def test_one_branch_against_the_prediction_refutes_the_critical_rates(
    branch: str, study: pd.DataFrame
) -> None:
    data = study.copy()
    rows = data["branch"] == branch
    for seed in range(3):
        run = rows & (data["seed"] == seed)
        loss = data.loc[run, "loss"].to_numpy()
        data.loc[run, "loss"] = loss[0] ** 2 / loss  # the change of its logarithm is reversed
    assert judged("critical-rates", data).outcome == "does not hold"


# Cases in which the prediction does not speak.


def test_learning_rates_on_one_side_decide_nothing(study: pd.DataFrame) -> None:
    data = study.copy()
    data.loc[data["branch"] == "sgd-low", "learning_rate"] = 1.0
    verdict = judged("critical-step-size", data)
    assert verdict.outcome == "undecided"
    assert "is not between 1 and 1.5" in verdict.note


def test_a_learning_rate_outside_the_interval_decides_nothing(study: pd.DataFrame) -> None:
    verdict = judged("bulk-lowers-dominant-raises", study, dominant="dom-high", bulk="bulk-high")
    assert verdict.outcome == "undecided"
    assert "the learning rate 1.5 is not between the critical ones" in verdict.note


def test_a_pair_in_the_wrong_place_is_named(study: pd.DataFrame) -> None:
    verdict = judged("critical-rates", study, **{"bulk-high": "bulk-low"})
    assert verdict.outcome == "undecided"
    assert "learning rate 0.02 of bulk-low is on the other side" in verdict.note


@pytest.mark.parametrize("column", ["noise_norm", "critical_lr_bulk", "solved_eigenvalues"])
def test_what_was_not_measured_at_the_start_decides_nothing(
    column: str, study: pd.DataFrame
) -> None:
    data = study.copy()
    data[column] = None if column == "solved_eigenvalues" else math.nan
    names = {"critical_lr_bulk": "critical-rates"}
    verdict = judged(names.get(column, "critical-step-size"), data)
    assert verdict.outcome == "undecided"
    assert "at the start of" in verdict.note


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", CLAIMS)
def test_diverged_branches_never_make_a_claim_hold(
    name: str, value: float, study: pd.DataFrame
) -> None:
    data = study.copy()
    lost = data.groupby(["seed", "branch"])["step"].rank() > 40
    data.loc[lost, ["loss", "alignment_gradient"]] = value
    verdict = judged(name, data)
    assert verdict.outcome != "holds"
    assert verdict.note


def test_roles_must_be_given(study: pd.DataFrame) -> None:
    with pytest.raises(InvalidInput, match="a branch for small, large"):
        judge(CLAIMS["critical-step-size"], study)
