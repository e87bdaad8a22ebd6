"""Published statements, each with a statistic and a rule, judged over seeds.

Every module here whose name ends in `_claims` states the claims of one theme, and registers each
where it is defined: a new claim is a new file. Its number was fixed before the runs; where it is a
matter of choice, the module says how it was chosen. Source of most: Song, Ahn, Yun 2025, "Does SGD
really happen in tiny subspaces?", arXiv 2405.16002.
"""

from __future__ import annotations

import importlib
import pkgutil

from thalweg.analysis.claims.claim import Claim, ClaimUse, Measurement, Rule
from thalweg.analysis.claims.judgement import DEFAULT_ROLES, Verdict, judge, judge_all
from thalweg.analysis.claims.verdicts import render_verdicts, verdicts_to_json

__all__ = [
    "DEFAULT_ROLES",
    "Claim",
    "ClaimUse",
    "Measurement",
    "Rule",
    "Verdict",
    "judge",
    "judge_all",
    "render_verdicts",
    "verdicts_to_json",
]

_FIRST = ("main_finding_claims", "dominant_subspace_claims", "noise_claims")
"""In listings these come first; the other themes follow by name."""

_THEMES = [module.name for module in pkgutil.iter_modules(__path__)]
for _theme in (*_FIRST, *sorted({*_THEMES} - {*_FIRST})):
    if _theme.endswith("_claims"):
        importlib.import_module(f"{__name__}.{_theme}")
