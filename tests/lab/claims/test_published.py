from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.lab import synthetic
from thalweg.errors import InvalidInput
from thalweg.lab.claims.published import (
    CLAIMS,
    Claim,
    Measurement,
    Rule,
    add_claim,
    judge,
    judge_all,
)

NAMES = ["gradient-aligns", "dominant-stalls", "bulk-suffices", "spectrum-gap"]


@pytest.fixture(scope="module")
def study() -> pd.DataFrame:
    return synthetic.study()


def change(data: pd.DataFrame, where: pd.Series, column: str, value: object) -> pd.DataFrame:
    """A copy of the table with one column replaced in some rows."""
    changed = data.copy()
    changed.loc[where, column] = value
    return changed


def test_the_four_claims_of_the_main_study_are_registered() -> None:
    assert [name for name in CLAIMS if name in NAMES] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_claim_says_what_would_refute_it_and_where_it_comes_from(name: str) -> None:
    claim = CLAIMS[name]
    assert claim.refuted_by
    assert "2025" in claim.source
    assert claim.minimum_seeds == 3


@pytest.mark.parametrize("name", NAMES)
def test_every_claim_holds_on_a_study_like_the_paper(name: str, study: pd.DataFrame) -> None:
    verdict = judge(CLAIMS[name], study)
    assert verdict.outcome == "holds", verdict
    assert verdict.low <= verdict.mean <= verdict.high
    assert list(verdict.values) == [0, 1, 2]
    assert verdict.note == ""


def test_the_statistics_are_the_numbers_the_study_was_built_with(study: pd.DataFrame) -> None:
    aligned, stalls, bulk, gap = (judge(CLAIMS[name], study) for name in NAMES)
    assert aligned.mean == pytest.approx(0.96, abs=0.003)
    assert stalls.mean == pytest.approx(synthetic.expected_progress(), abs=0.02)
    assert bulk.mean == pytest.approx(1.0, abs=0.02)
    assert gap.beside["lambda_{k+1} / lambda_k"] == pytest.approx(0.3 / 0.8, rel=0.05)


# Cases built so that a claim is false.


def test_random_directions_do_not_align() -> None:
    verdict = judge(CLAIMS["gradient-aligns"], synthetic.random_directions())
    assert verdict.outcome == "does not hold"
    assert verdict.mean == pytest.approx(math.sqrt(synthetic.K / synthetic.PARAMETERS), rel=0.1)


def test_on_least_squares_of_rank_k_the_dominant_branch_is_the_plain_one() -> None:
    verdict = judge(CLAIMS["dominant-stalls"], synthetic.least_squares())
    assert verdict.outcome == "does not hold"
    assert verdict.mean == pytest.approx(1.0, abs=1e-9)


def test_on_least_squares_of_rank_k_the_bulk_branch_stands_still() -> None:
    verdict = judge(CLAIMS["bulk-suffices"], synthetic.least_squares())
    assert verdict.outcome == "does not hold"
    assert verdict.mean > 10


@pytest.mark.parametrize(
    "spectrum",
    [
        np.full(20, 2.0),
        np.geomspace(5.0, 0.01, 20),
        1 / np.arange(1, 21),
        1 / np.arange(1, 21) ** 2,
        np.linspace(2.0, 0.1, 20),
        np.r_[50.0, np.geomspace(2.0, 1.0, 19)],
    ],
    ids=["flat", "geometric", "power 1", "power 2", "linear", "one outlier"],
)
def test_a_spectrum_without_a_gap_at_k_has_no_gap(spectrum: np.ndarray) -> None:
    verdict = judge(CLAIMS["spectrum-gap"], synthetic.with_spectrum(spectrum))
    assert verdict.outcome == "does not hold"


def test_a_bulk_of_zero_or_negative_eigenvalues_is_a_gap() -> None:
    spectrum = np.r_[np.linspace(3, 1, 10), np.linspace(1e-9, -0.2, 10)]
    assert judge(CLAIMS["spectrum-gap"], synthetic.with_spectrum(spectrum)).outcome == "holds"


def test_a_gap_for_two_classes_is_seen() -> None:
    spectrum = np.array([4.0, 2.5, 0.4, 0.35])
    verdict = judge(CLAIMS["spectrum-gap"], synthetic.with_spectrum(spectrum))
    assert verdict.outcome == "holds"
    assert verdict.mean == pytest.approx(2.5**2 / (4.0 * 0.4))


def test_a_bulk_branch_that_falls_behind_late_is_found_at_the_last_horizon(
    study: pd.DataFrame,
) -> None:
    late = (study["branch"] == "bulk-sgd") & (study["step"] > 1000)
    data = change(study, late, "loss", study.loc[late, "loss"] * 1.4)
    verdict = judge(CLAIMS["bulk-suffices"], data)
    assert verdict.outcome == "does not hold"
    assert verdict.beside["ratio at 25% of the branch"] < 1.05


def test_a_dominant_branch_that_climbs_makes_negative_progress(study: pd.DataFrame) -> None:
    later = (study["branch"] == "dom-sgd") & (study["step"] > 500)
    data = change(study, later, "loss", study.loc[later, "loss"] * 1.5)
    verdict = judge(CLAIMS["dominant-stalls"], data)
    assert verdict.outcome == "holds"
    assert verdict.mean < -0.5


# Seeds.


def test_one_seed_is_undecided_and_shows_its_value(study: pd.DataFrame) -> None:
    verdict = judge(CLAIMS["gradient-aligns"], study[study["seed"] == 1])
    assert verdict.outcome == "undecided"
    assert "one seed" in verdict.note
    assert verdict.mean == verdict.values[1]
    assert math.isnan(verdict.low)


def test_fewer_seeds_than_the_minimum_are_undecided(study: pd.DataFrame) -> None:
    verdict = judge(CLAIMS["gradient-aligns"], study[study["seed"] < 2])
    assert verdict.outcome == "undecided"
    assert "2 seeds measured, 3 needed" in verdict.note


def test_seeds_on_both_sides_of_the_threshold_are_undecided(study: pd.DataFrame) -> None:
    data = change(study, study["seed"] == 2, "alignment_gradient", 0.8)
    verdict = judge(CLAIMS["gradient-aligns"], data)
    assert verdict.outcome == "undecided"
    assert "contains the threshold" in verdict.note


# Missing and broken data.


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_column_is_named(name: str, study: pd.DataFrame) -> None:
    column = CLAIMS[name].needs_columns[0]
    with pytest.raises(InvalidInput, match=column):
        judge(CLAIMS[name], study.drop(columns=column))


@pytest.mark.parametrize(
    ("name", "branch"),
    [
        ("gradient-aligns", "sgd"),
        ("dominant-stalls", "dom-sgd"),
        ("bulk-suffices", "bulk-sgd"),
        ("spectrum-gap", "sgd"),
    ],
)
def test_a_missing_branch_is_named(name: str, branch: str, study: pd.DataFrame) -> None:
    with pytest.raises(InvalidInput, match=f"a study with the branches {branch}"):
        judge(CLAIMS[name], study[study["branch"] != branch])


def test_an_empty_table_is_refused(study: pd.DataFrame) -> None:
    with pytest.raises(InvalidInput, match="no rows"):
        judge(CLAIMS["gradient-aligns"], study.iloc[:0])


def test_judging_all_claims_reports_what_is_missing_instead_of_stopping(
    study: pd.DataFrame,
) -> None:
    verdicts = judge_all(CLAIMS.values(), study[study["branch"] != "bulk-sgd"])
    outcomes = {verdict.claim: verdict.outcome for verdict in verdicts}
    assert [outcomes[name] for name in NAMES] == ["holds", "holds", "undecided", "holds"]
    assert any("bulk-sgd" in verdict.note for verdict in verdicts)


def test_a_branch_missing_for_one_seed_leaves_the_claim_undecided(study: pd.DataFrame) -> None:
    data = study[~((study["branch"] == "bulk-sgd") & (study["seed"] == 1))]
    verdict = judge(CLAIMS["bulk-suffices"], data)
    assert verdict.outcome == "undecided"
    assert "seed 1: branch 'bulk-sgd' is missing" in verdict.note
    assert math.isnan(verdict.values[1])


def test_a_bulk_branch_that_diverges_refutes_its_claim(study: pd.DataFrame) -> None:
    lost = (study["branch"] == "bulk-sgd") & (study["step"] > 800) & (study["seed"] == 0)
    verdict = judge(CLAIMS["bulk-suffices"], change(study, lost, "loss", np.nan))
    assert verdict.outcome == "does not hold"
    assert math.isinf(verdict.mean)
    assert "seed 0: loss of bulk-sgd becomes non-finite after step 800" in verdict.note


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seeds", [[0], [0, 1, 2]])
def test_data_of_diverged_branches_never_make_a_claim_hold(
    name: str, value: float, seeds: list[int], study: pd.DataFrame
) -> None:
    lost = (study["branch"] != "trunk") & (study["step"] > 800) & study["seed"].isin(seeds)
    data = study.copy()
    data.loc[lost, ["loss", "alignment_gradient"]] = value
    data["solved_eigenvalues"] = [
        [value] * 20 if gone and row is not None else row
        for gone, row in zip(lost, data["solved_eigenvalues"], strict=True)
    ]
    verdict = judge(CLAIMS[name], data)
    assert verdict.outcome != "holds"
    assert verdict.note


def test_branches_that_end_at_different_steps_are_not_compared(study: pd.DataFrame) -> None:
    data = study[~((study["branch"] == "bulk-sgd") & (study["step"] > 900))]
    verdict = judge(CLAIMS["bulk-suffices"], data)
    assert verdict.outcome == "undecided"
    assert "bulk-sgd at step 900" in verdict.note


def test_branches_from_different_checkpoints_are_not_compared(study: pd.DataFrame) -> None:
    first = (study["branch"] == "dom-sgd") & (study["step"] == 500)
    verdict = judge(CLAIMS["dominant-stalls"], change(study, first, "loss", 0.2))
    assert verdict.outcome == "undecided"
    assert "different losses" in verdict.note


def test_a_plain_branch_without_progress_decides_nothing(study: pd.DataFrame) -> None:
    still = study["branch"].isin(["sgd", "dom-sgd"])
    verdict = judge(CLAIMS["dominant-stalls"], change(study, still, "loss", 0.12))
    assert verdict.outcome == "undecided"
    assert "no decrease to compare with" in verdict.note


def test_rows_on_which_a_slow_probe_was_not_due_are_no_divergence(study: pd.DataFrame) -> None:
    data = change(study, study["step"] % 20 != 0, "loss", np.nan)
    assert judge(CLAIMS["bulk-suffices"], data).outcome == "holds"


def test_a_table_read_from_parquet_gives_the_same_verdicts(
    study: pd.DataFrame, tmp_path: Path
) -> None:
    study.to_parquet(tmp_path / "metrics.parquet")
    read = pd.read_parquet(tmp_path / "metrics.parquet")
    for claim in CLAIMS.values():
        assert judge(claim, read) == judge(claim, study)


def test_roles_name_the_branches(study: pd.DataFrame) -> None:
    data = study.replace({"branch": {"sgd": "full", "dom-sgd": "only-dominant"}})
    roles = {"plain": "full", "dominant": "only-dominant"}
    assert judge(CLAIMS["dominant-stalls"], data, roles).outcome == "holds"
    with pytest.raises(InvalidInput, match="a branch for bulk"):
        judge(CLAIMS["bulk-suffices"], data, roles)


def test_a_plugin_adds_a_claim_once(study: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thalweg.lab.claims.published.CLAIMS", {})
    claim = Claim(
        name="loss-is-small",
        statement="The loss ends below one.",
        source="this test",
        statistic="last loss",
        measure=lambda seed: Measurement(float(seed.table("plain")["loss"].iloc[-1])),
        rule=Rule(1.0, "below"),
        refuted_by="a loss of two",
        needs_roles=("plain",),
        needs_columns=("loss",),
    )
    assert judge(add_claim(claim), study).outcome == "holds"
    with pytest.raises(InvalidInput, match="not used yet"):
        add_claim(claim)
