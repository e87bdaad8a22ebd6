"""What a study leaves on disk: folders, metrics, checkpoints and status."""

from __future__ import annotations

from thalweg.lab.store.folders import (
    RunFolder,
    Status,
    StudyFolder,
    check_disk,
    environment,
    estimate_disk,
    find_studies,
    list_runs,
    load,
    open_study,
)

__all__ = [
    "RunFolder",
    "Status",
    "StudyFolder",
    "check_disk",
    "environment",
    "estimate_disk",
    "find_studies",
    "list_runs",
    "load",
    "open_study",
]
