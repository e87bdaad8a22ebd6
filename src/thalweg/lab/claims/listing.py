"""All claims with their rules, and the last verdict on each problem."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from thalweg.lab.claims.published import CLAIMS
from thalweg.lab.store import find_studies


def claim_rows(root: Path | str = "runs") -> list[dict[str, Any]]:
    """One row a claim: what it says, how it is judged, and the newest verdict by study."""
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
                study: verdict["outcome"]
                for study, found in verdicts.items()
                for verdict in found
                if verdict["claim"] == claim.name
            },
        }
        for claim in CLAIMS.values()
    ]
