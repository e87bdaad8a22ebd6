from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.analysis.claims.branches import falling, table
from thalweg import registry
from thalweg.analysis.claims import ClaimUse, judge_all, verdicts_to_json
from thalweg.analysis.claims.listing import claim_rows
from thalweg.lab.store import StudyFolder


@pytest.fixture
def judged(tmp_path: Path) -> Path:
    """A folder with one study in which a claim is judged twice."""
    claim = registry.claims["bulk-suffices"]
    data = table(
        sgd={"loss": falling(0.5)},
        bulk_sgd={"loss": falling(0.5)},
        bulk_k20={"loss": falling(0.8)},
    )
    verdicts = judge_all([claim, ClaimUse(claim, {"plain": "sgd", "bulk": "bulk-k20"})], data)
    study = StudyFolder.create(tmp_path, "robustness", "")
    study.write_verdicts(json.loads(verdicts_to_json(verdicts)))
    return tmp_path


def test_each_verdict_of_a_study_is_listed(judged: Path) -> None:
    rows = {row["claim"]: row for row in claim_rows(judged)}
    assert rows["bulk-suffices"]["verdicts"] == {
        "robustness": "holds",
        "robustness, bulk-k20 against sgd": "does not hold",
    }
    assert rows["spectrum-gap"]["verdicts"] == {}
    assert set(rows) == set(registry.claims)


def test_verdicts_written_without_a_label_are_listed_by_their_study(judged: Path) -> None:
    study = StudyFolder(judged / "robustness")
    study.write_verdicts([{"claim": "bulk-suffices", "outcome": "holds"}])
    rows = {row["claim"]: row for row in claim_rows(judged)}
    assert rows["bulk-suffices"]["verdicts"] == {"robustness": "holds"}
