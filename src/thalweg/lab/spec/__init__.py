"""The experiment as data: from a file, a built-in name and the command line, checked at once."""

from __future__ import annotations

from thalweg.lab.spec.loading import (
    PROBLEM_SPECS,
    BranchSpec,
    CheckpointSpec,
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

__all__ = [
    "PROBLEM_SPECS",
    "BranchSpec",
    "CheckpointSpec",
    "PhaseSpec",
    "ProblemSpec",
    "Spec",
    "SplitSpec",
    "SubspaceSpec",
    "builtin_specs",
    "check_names",
    "dump_spec",
    "load_spec",
    "parse_spec",
    "spec_hash",
]
