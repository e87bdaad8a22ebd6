"""Published statements, each with a statistic and a rule, judged over seeds."""

from __future__ import annotations

from thalweg.analysis.claims.claim import Claim, ClaimUse, Rule
from thalweg.analysis.claims.judgement import DEFAULT_ROLES, Verdict, judge, judge_all
from thalweg.analysis.claims.verdicts import render_verdicts, verdicts_to_json

__all__ = [
    "DEFAULT_ROLES",
    "Claim",
    "ClaimUse",
    "Rule",
    "Verdict",
    "judge",
    "judge_all",
    "render_verdicts",
    "verdicts_to_json",
]
