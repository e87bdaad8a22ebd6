from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.analysis import synthetic
from tests.analysis.claims.branches import MAIN_NAMES, change, falling, table
from thalweg import registry
from thalweg.analysis.claims import Claim, ClaimUse, Rule, judge, judge_all
from thalweg.analysis.claims.claim import Measurement, SeedTables
from thalweg.errors import InvalidInput


@pytest.fixture(scope="module")
def study() -> pd.DataFrame:
    return synthetic.study()


# Seeds.


def test_one_seed_is_undecided_and_shows_its_value(study: pd.DataFrame) -> None:
    verdict = judge(registry.claims["gradient-aligns"], study[study["seed"] == 1])
    assert verdict.outcome == "undecided"
    assert "one seed" in verdict.note
    assert verdict.mean == verdict.values[1]
    assert math.isnan(verdict.low)


def test_fewer_seeds_than_the_minimum_are_undecided(study: pd.DataFrame) -> None:
    verdict = judge(registry.claims["gradient-aligns"], study[study["seed"] < 2])
    assert verdict.outcome == "undecided"
    assert "2 seeds measured, 3 needed" in verdict.note


def test_seeds_on_both_sides_of_the_threshold_are_undecided(study: pd.DataFrame) -> None:
    data = change(study, study["seed"] == 2, "alignment_gradient", 0.8)
    verdict = judge(registry.claims["gradient-aligns"], data)
    assert verdict.outcome == "undecided"
    assert "contains the threshold" in verdict.note


# Missing and broken data.


@pytest.mark.parametrize("name", MAIN_NAMES)
def test_a_missing_column_is_named(name: str, study: pd.DataFrame) -> None:
    column = registry.claims[name].needs_columns[0]
    with pytest.raises(InvalidInput, match=column):
        judge(registry.claims[name], study.drop(columns=column))


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
        judge(registry.claims[name], study[study["branch"] != branch])


def test_an_empty_table_is_refused(study: pd.DataFrame) -> None:
    with pytest.raises(InvalidInput, match="no rows"):
        judge(registry.claims["gradient-aligns"], study.iloc[:0])


def test_judging_all_claims_reports_what_is_missing_instead_of_stopping(
    study: pd.DataFrame,
) -> None:
    verdicts = judge_all(registry.claims.values(), study[study["branch"] != "bulk-sgd"])
    outcomes = {verdict.claim: verdict.outcome for verdict in verdicts}
    assert [outcomes[name] for name in MAIN_NAMES] == ["holds", "holds", "undecided", "holds"]
    assert any("bulk-sgd" in verdict.note for verdict in verdicts)


def test_a_branch_missing_for_one_seed_leaves_the_claim_undecided(study: pd.DataFrame) -> None:
    data = study[~((study["branch"] == "bulk-sgd") & (study["seed"] == 1))]
    verdict = judge(registry.claims["bulk-suffices"], data)
    assert verdict.outcome == "undecided"
    assert "seed 1: branch 'bulk-sgd' is missing" in verdict.note
    assert math.isnan(verdict.values[1])


def test_branches_that_end_at_different_steps_are_not_compared(study: pd.DataFrame) -> None:
    data = study[~((study["branch"] == "bulk-sgd") & (study["step"] > 900))]
    verdict = judge(registry.claims["bulk-suffices"], data)
    assert verdict.outcome == "undecided"
    assert "bulk-sgd at step 900" in verdict.note


def test_rows_on_which_a_slow_probe_was_not_due_are_no_divergence(study: pd.DataFrame) -> None:
    data = change(study, study["step"] % 20 != 0, "loss", np.nan)
    assert judge(registry.claims["bulk-suffices"], data).outcome == "holds"


def test_roles_name_the_branches(study: pd.DataFrame) -> None:
    data = study.replace({"branch": {"sgd": "full", "dom-sgd": "only-dominant"}})
    roles = {"plain": "full", "dominant": "only-dominant"}
    assert judge(registry.claims["dominant-stalls"], data, roles).outcome == "holds"
    with pytest.raises(InvalidInput, match="a branch for bulk"):
        judge(registry.claims["bulk-suffices"], data, roles)


# Uses: one claim for several branches of one study.


@pytest.fixture(scope="module")
def variants() -> pd.DataFrame:
    """A plain branch and three bulk ones: as far, half as far, and a different length."""
    data = table(
        sgd={"loss": falling(0.5)},
        bulk_sgd={"loss": falling(0.5)},
        bulk_k20={"loss": falling(0.8)},
        bulk_short={"loss": falling(0.5)},
    )
    return data[~((data["branch"] == "bulk-short") & (data["step"] > 250))]


def test_a_use_is_judged_for_its_own_branches(variants: pd.DataFrame) -> None:
    claim = registry.claims["bulk-suffices"]
    standard, other = judge_all([claim, ClaimUse(claim, {"bulk": "bulk-k20"})], variants)
    assert (standard.outcome, standard.roles) == ("holds", {})
    assert (other.outcome, other.roles) == ("does not hold", {"bulk": "bulk-k20"})
    assert standard == judge(claim, variants)


@pytest.mark.parametrize(
    ("roles", "label"),
    [
        ({}, "bulk-suffices"),
        ({"bulk": "bulk-k20"}, "bulk-suffices: bulk-k20"),
        ({"plain": "sgd"}, "bulk-suffices: sgd"),
        ({"bulk": "bulk-k20", "plain": "sgd"}, "bulk-suffices: bulk-k20 against sgd"),
        ({"plain": "sgd", "bulk": "bulk-k20"}, "bulk-suffices: bulk-k20 against sgd"),
    ],
)
def test_a_label_names_the_branches_that_were_said(
    roles: dict[str, str], label: str, variants: pd.DataFrame
) -> None:
    assert judge(ClaimUse(registry.claims["bulk-suffices"], roles), variants).label == label


def test_a_use_without_its_branch_is_undecided_and_the_others_are_judged(
    variants: pd.DataFrame,
) -> None:
    claim = registry.claims["bulk-suffices"]
    missing, present = judge_all([ClaimUse(claim, {"bulk": "bulk-k30"}), claim], variants)
    assert missing.outcome == "undecided"
    assert "bulk-k30" in missing.note
    assert missing.label == "bulk-suffices: bulk-k30"
    assert present.outcome == "holds"


def test_a_claim_whose_roles_the_study_does_not_have_is_undecided(variants: pd.DataFrame) -> None:
    (verdict,) = judge_all(
        [registry.claims["alignment-returns"]], variants.assign(alignment_gradient=1.0)
    )
    assert verdict.outcome == "undecided"
    assert "a branch for noisy, returned" in verdict.note


def test_a_role_that_the_claim_does_not_have_is_refused() -> None:
    with pytest.raises(InvalidInput, match="got 'noisy', allowed: branches for plain, bulk"):
        ClaimUse(registry.claims["bulk-suffices"], {"noisy": "sgd"})


def ratio_of_ends(value: float = 1.0, same_end: bool = True, logarithmic: bool = True) -> Claim:
    """A claim on the ratio of the last losses of two branches, times a value."""

    def measure(seed: SeedTables) -> Measurement:
        plain, bulk = (float(seed.table(role)["loss"].iloc[-1]) for role in ("plain", "bulk"))
        return Measurement(value * bulk / plain)

    return Claim(
        name="test",
        statement="The branches end alike.",
        source="this test",
        statistic="last loss, bulk / plain",
        measure=measure,
        rule=Rule(2.0, "below"),
        refuted_by="a branch that ends higher",
        needs_roles=("plain", "bulk"),
        needs_columns=("loss",),
        logarithmic=logarithmic,
        same_end=same_end,
    )


def test_branches_may_end_apart_where_the_claim_allows_it(variants: pd.DataFrame) -> None:
    roles = {"bulk": "bulk-short"}
    strict = judge(ClaimUse(ratio_of_ends(), roles), variants)
    assert strict.outcome == "undecided"
    assert "bulk-short at step 250" in strict.note
    assert judge(ClaimUse(ratio_of_ends(same_end=False), roles), variants).outcome == "holds"


def test_a_run_that_diverged_is_judged_although_it_ends_early(variants: pd.DataFrame) -> None:
    last = (variants["branch"] == "bulk-short") & (variants["step"] == 250)
    verdict = judge(
        ClaimUse(registry.claims["bulk-suffices"], {"bulk": "bulk-short"}),
        change(variants, last, "loss", np.nan),
    )
    assert verdict.outcome == "does not hold"
    assert "bulk-short becomes non-finite: diverged at step 250" in verdict.note


@pytest.mark.parametrize(
    ("value", "direction", "outcome"),
    [
        (math.inf, "below", "does not hold"),
        (math.inf, "above", "undecided"),
        (0.0, "above", "does not hold"),
        (0.0, "below", "undecided"),
    ],
)
def test_an_extreme_ratio_refutes_or_leaves_open(
    value: float, direction: Any, outcome: str, variants: pd.DataFrame
) -> None:
    claim = replace(ratio_of_ends(value), rule=Rule(2.0, direction))
    verdict = judge(claim, variants)
    assert (verdict.outcome, verdict.mean) == (outcome, value)


def test_a_negative_ratio_is_not_measured(variants: pd.DataFrame) -> None:
    verdict = judge(ratio_of_ends(-1.0), variants)
    assert verdict.outcome == "undecided"
    assert "no logarithm" in verdict.note
    assert judge(ratio_of_ends(-1.0, logarithmic=False), variants).outcome == "holds"
