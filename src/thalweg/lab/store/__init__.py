"""What a study leaves on disk: folders, metrics, checkpoints and status."""

from __future__ import annotations

from thalweg.lab.store.diskspace import check_disk, estimate_disk
from thalweg.lab.store.folders import (
    TRUNK,
    RunFolder,
    StudyFolder,
    find_studies,
    list_runs,
    open_study,
)
from thalweg.lab.store.frames import load
from thalweg.lab.store.status import Status

__all__ = [
    "TRUNK",
    "RunFolder",
    "Status",
    "StudyFolder",
    "check_disk",
    "estimate_disk",
    "find_studies",
    "list_runs",
    "load",
    "open_study",
]
