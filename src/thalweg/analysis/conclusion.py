"""Verdicts, figures and report of a study: what is made of its measurements in the end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from thalweg import registry
from thalweg.analysis.claims.claim import Claim, ClaimUse
from thalweg.analysis.claims.judgement import TRUNK_ROLE, Verdict, judge_all, with_note
from thalweg.analysis.claims.subspace_caveat import WITHOUT_SUBSPACE, subspace_caveat
from thalweg.analysis.claims.verdicts import verdicts_to_json
from thalweg.lab.config.smoke_run import WARNING
from thalweg.lab.config.spec import Spec
from thalweg.lab.store import TRUNK, StudyFolder, load
from thalweg.lab.study import roles_of

if TYPE_CHECKING:
    import pandas

    from thalweg.analysis.figures.figure import SavedFigures

Made = Mapping[str, Any]
"""What the conclusions before this one gave, by name."""


@registry.conclusions.register("verdicts")
def verdicts(study: StudyFolder, spec: Spec, made: Made) -> list[Verdict]:
    """Judge the claims on what has been measured, and write the verdicts into the folder."""
    uses = [ClaimUse(registry.claims[use.name], use.roles) for use in spec.claim_uses]
    data = load(study)
    roles = roles_of(spec)
    targets = {name: spec.of_branch(name).subspace.error for name in (TRUNK, *spec.branches)}
    found = []
    for use, verdict in zip(uses, judge_all(uses, data, roles), strict=True):
        own = branches_on_subspace(use.claim, {**roles, **TRUNK_ROLE, **use.roles}, spec)
        rows = cast("pandas.DataFrame", data[data["branch"].isin(sorted(own))])
        caveat = subspace_caveat(rows, targets)
        found.append(with_note(verdict, caveat))
    study.write_verdicts(json.loads(verdicts_to_json(found)))
    return found


def branches_on_subspace(claim: Claim, roles: Mapping[str, str], spec: Spec) -> set[str]:
    """The branches of a claim that rest on a tracked subspace: by what is measured, or by a split.

    Args:
        roles: the branch of each role.
    """
    own = {roles[role] for role in claim.needs_roles if role in roles}
    if set(claim.needs_columns) - WITHOUT_SUBSPACE:
        return own
    phases = {name: spec.branch_phase(name) for name in own if name in spec.branches}
    splits = {name for name, phase in phases.items() if phase.split and phase.split.changes}
    return {name for name in splits if spec.of_branch(name).subspace.source != "threshold"}


@registry.conclusions.register("figures")
def figures(study: StudyFolder, spec: Spec, made: Made) -> SavedFigures:
    """Draw the spec's figures, or all that can be drawn."""
    from thalweg.analysis.figures import save_figures

    return save_figures(load(study), study.path / "figures", roles_of(spec), spec.figures)


@registry.conclusions.register("report")
def report(study: StudyFolder, spec: Spec, made: Made) -> Path:
    """Write the page that shows all of it, one file that opens offline."""
    from thalweg.analysis.report import write_report

    return write_report(
        study.path,
        load(study),
        made["verdicts"],
        study.spec_text,
        study.environments()[-1],
        made["figures"],
        title=f"{spec.name} on {spec.problem.data.registered_name}",
        roles=roles_of(spec),
        command=f"thalweg run {study.spec_file}",
        warning=WARNING if spec.smoke else "",
    )
