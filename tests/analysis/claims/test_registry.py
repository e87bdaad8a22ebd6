from __future__ import annotations

import pandas as pd
import pytest

from tests.analysis import synthetic
from thalweg import registry
from thalweg.analysis.claims import Claim, Rule, judge
from thalweg.analysis.claims.claim import Measurement
from thalweg.errors import InvalidInput


@pytest.fixture(scope="module")
def study() -> pd.DataFrame:
    return synthetic.study()


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
    assert judge(registry.claims.add(claim.name, claim), study).outcome == "holds"
    with pytest.raises(InvalidInput, match="not used yet"):
        registry.claims.add(claim.name, claim)
