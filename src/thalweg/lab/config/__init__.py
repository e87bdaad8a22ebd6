"""The experiment as data: from a file, a built-in name and the command line, checked at once."""

from __future__ import annotations

from thalweg.lab.config.loading import (
    PROBLEM_SPECS,
    BranchSpec,
    CheckpointSpec,
    ClaimSpec,
    NoiseSpec,
    PhaseSpec,
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
from thalweg.lab.config.smoke_run import smoke
from thalweg.lab.config.spec import TRUNK
from thalweg.lab.config.studies import builtin_studies, load_study
from thalweg.problems.problem_spec import ProblemSpec

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
    "smoke",
    "spec_hash",
]
