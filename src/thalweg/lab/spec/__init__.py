"""The experiment as data: from a file, a built-in name and the command line, checked at once."""

from __future__ import annotations

from thalweg.lab.spec.loading import (
    PROBLEM_SPECS,
    BranchSpec,
    CheckpointSpec,
    ClaimSpec,
    NoiseSpec,
    PhaseSpec,
    ProblemSpec,
    Spec,
    SplitSpec,
    SubspaceSpec,
    builtin_specs,
    check_names,
    dump_spec,
    load_spec,
    parse_spec,
    spec_hash,
)
from thalweg.lab.spec.models import TRUNK
from thalweg.lab.spec.studies import builtin_studies, load_study

__all__ = [
    "PROBLEM_SPECS",
    "TRUNK",
    "BranchSpec",
    "CheckpointSpec",
    "ClaimSpec",
    "NoiseSpec",
    "PhaseSpec",
    "ProblemSpec",
    "Spec",
    "SplitSpec",
    "SubspaceSpec",
    "builtin_specs",
    "builtin_studies",
    "check_names",
    "dump_spec",
    "load_spec",
    "load_study",
    "parse_spec",
    "spec_hash",
]
