from __future__ import annotations

import pandas as pd
import pytest

from tests.lab import synthetic
from thalweg.errors import InvalidInput
from thalweg.lab.claims import Claim, Rule, add_claim, judge
from thalweg.lab.claims.claim import Measurement


@pytest.fixture(scope="module")
def study() -> pd.DataFrame:
    return synthetic.study()


def test_a_plugin_adds_a_claim_once(study: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thalweg.lab.claims.registry.CLAIMS", {})
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
