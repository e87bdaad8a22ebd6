"""All claims with their rules, and the last verdict on each problem."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from thalweg import registry
from thalweg.lab.store import find_studies


def claim_rows(root: Path | str = "runs") -> list[dict[str, Any]]:
    """One row a claim: what it says, how it is judged, and the newest verdicts by study.

    A claim judged for several branches of one study has a verdict for each: the study's name is
    then followed by the branches, such as `main-digits, bulk-k20 against sgd`.
    """
    verdicts = {study.name: study.read_verdicts() or [] for study in find_studies(root)}
    return [
        {
            "claim": claim.name,
            "statement": claim.statement,
            "source": claim.source,
            "statistic": claim.statistic,
            "rule": claim.rule.text,
            "refuted_by": claim.refuted_by,
            "minimum_seeds": claim.minimum_seeds,
            "verdicts": {
                _place(study, verdict): verdict["outcome"]
                for study, found in verdicts.items()
                for verdict in found
                if verdict["claim"] == claim.name
            },
        }
        for claim in registry.claims.values()
    ]


def _place(study: str, verdict: Mapping[str, Any]) -> str:
    """The study, and the branches where these were named for the claim."""
    branches = verdict.get("label", "").removeprefix(verdict["claim"]).removeprefix(": ")
    return f"{study}, {branches}" if branches else study
