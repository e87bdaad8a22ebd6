from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.analysis import synthetic
from tests.analysis.claims.branches import MAIN_NAMES, table
from tests.sampling import few
from thalweg import registry
from thalweg.analysis.claims import Claim, ClaimUse, Rule, judge, judge_all
from thalweg.analysis.claims.claim import Measurement
from thalweg.analysis.claims.judgement import DEFAULT_ROLES
from thalweg.errors import InvalidInput

VECTORS = {column for probe in registry.probes.values() for column in probe.vectors}
#: Claims on columns of numbers; those on columns of vectors, such as spectra, have their own tests.
ON_NUMBERS = [
    claim for claim in registry.claims.values() if not VECTORS.intersection(claim.needs_columns)
]


@pytest.fixture(scope="module")
def study() -> pd.DataFrame:
    return synthetic.study()


def test_the_four_claims_of_the_main_study_are_registered() -> None:
    assert [name for name in registry.claims if name in MAIN_NAMES] == list(MAIN_NAMES)


@pytest.mark.parametrize("name", registry.claims)
def test_every_claim_says_what_would_refute_it_and_where_it_comes_from(name: str) -> None:
    claim = registry.claims[name]
    assert claim.name == name
    assert claim.statement.endswith(".")
    assert claim.statistic
    assert claim.refuted_by
    assert re.search(r"20\d\d", claim.source) or "Thalweg's own" in claim.source
    assert claim.minimum_seeds >= 3
    assert claim.needs_roles


@pytest.mark.parametrize("lost", few(1, ["silence", "infinity", "divergence"]))
@pytest.mark.parametrize("claim", ON_NUMBERS, ids=lambda claim: claim.name)
def test_no_claim_holds_on_branches_that_diverge(claim: Claim, lost: str) -> None:
    columns = dict.fromkeys({"loss", *claim.needs_columns}, 1.0)
    data = table(**dict.fromkeys(claim.needs_roles, columns))
    numbers = list(columns)
    if lost == "divergence":
        data = data[data["step"] <= 200]
        data.loc[data["step"] == 200, numbers] = np.nan
    else:
        data.loc[data["step"] > 200, numbers] = np.nan if lost == "silence" else np.inf
    roles = {role: role for role in claim.needs_roles}
    verdict = judge(ClaimUse(claim, roles), data)
    assert verdict.outcome != "holds"
    assert "non-finite" in verdict.note


@pytest.mark.parametrize("claim", registry.claims.values(), ids=lambda claim: claim.name)
def test_every_claim_is_undecided_where_nothing_was_measured(claim: Claim) -> None:
    columns = dict.fromkeys(claim.needs_columns, np.nan)
    data = table(**{role: {**columns, "other": 1.0} for role in claim.needs_roles})
    roles = {role: role for role in claim.needs_roles}
    (verdict,) = judge_all([ClaimUse(claim, roles)], data)
    assert verdict.outcome == "undecided"
    assert "seed 0: " in verdict.note


@pytest.mark.parametrize("name", MAIN_NAMES)
def test_every_claim_holds_on_a_study_like_the_paper(name: str, study: pd.DataFrame) -> None:
    verdict = judge(registry.claims[name], study)
    assert verdict.outcome == "holds", verdict
    assert verdict.low <= verdict.mean <= verdict.high
    assert list(verdict.values) == [0, 1, 2]
    assert verdict.note == ""


def test_the_statistics_are_the_numbers_the_study_was_built_with(study: pd.DataFrame) -> None:
    aligned, stalls, bulk, gap = (judge(registry.claims[name], study) for name in MAIN_NAMES)
    assert aligned.mean == pytest.approx(0.96, abs=0.003)
    assert stalls.mean == pytest.approx(synthetic.expected_progress(), abs=0.02)
    assert bulk.mean == pytest.approx(1.0, abs=0.02)
    assert gap.beside["lambda_{k+1} / lambda_k"] == pytest.approx(0.3 / 0.8, rel=0.05)


def test_a_table_read_from_parquet_gives_the_same_verdicts(
    study: pd.DataFrame, tmp_path: Path
) -> None:
    study.to_parquet(tmp_path / "metrics.parquet")
    read = pd.read_parquet(tmp_path / "metrics.parquet")
    measurable = [
        claim for claim in registry.claims.values() if set(claim.needs_roles) <= {*DEFAULT_ROLES}
    ]
    assert repr(judge_all(measurable, read)) == repr(judge_all(measurable, study))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", MAIN_NAMES)
@pytest.mark.parametrize("seeds", few(1, [[0, 1, 2], [0]]))
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
    verdict = judge(registry.claims[name], data)
    assert verdict.outcome != "holds"
    assert verdict.note


def test_a_plugin_adds_a_claim_once(study: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.claims, "_entries", {})
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
    assert judge(registry.claims.add_named(claim), study).outcome == "holds"
    with pytest.raises(InvalidInput, match="not used yet"):
        registry.claims.add_named(claim)
