"""Published statements, each with a statistic and a rule, judged over seeds."""

from __future__ import annotations

from thalweg.lab.claims.claim import Claim, ClaimUse, Rule
from thalweg.lab.claims.judgement import DEFAULT_ROLES, Verdict, judge, judge_all
from thalweg.lab.claims.published import CLAIMS, add_claim
from thalweg.lab.claims.verdicts import render_verdicts, verdicts_to_json

__all__ = [
    "CLAIMS",
    "DEFAULT_ROLES",
    "Claim",
    "ClaimUse",
    "Rule",
    "Verdict",
    "add_claim",
    "judge",
    "judge_all",
    "render_verdicts",
    "verdicts_to_json",
]
