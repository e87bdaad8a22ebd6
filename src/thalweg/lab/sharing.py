"""What do studies share? A run that another study has made already is taken over, not made again.

Two runs with one content hash make the same numbers to the last bit: same problem, seed, device,
probes, and the same phases and subspaces all the way from the initial parameters.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from thalweg.errors import ThalwegError
from thalweg.lab.run_names import TRUNK
from thalweg.lab.schedule import Task
from thalweg.lab.spec import Spec
from thalweg.lab.spec.loading import MEASURED
from thalweg.lab.store import RunFolder, StudyFolder, find_studies


def content_hash(spec: Spec, task: Task, fingerprint: str) -> str:
    """64 hexadecimal digits of everything that determines a run's numbers."""
    chain: list[dict[str, Any]] = []
    branch: str | None = task.branch
    while branch is not None and branch != TRUNK:
        chain.append(_content(spec, branch, [spec.branch_phase(branch)]))
        branch = spec.before(branch)
    chain.append(_content(spec, TRUNK, spec.phases))
    common = spec.model_dump(
        mode="json",
        include={"problem", "probes", "device", "dtype", "threads", "initial_checkpoint"},
    )
    common["problem"]["data"].pop("data_dir", None)
    text = json.dumps([task.seed, fingerprint, common, chain], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def known_way_to_multiply(spec: Spec, root: Path) -> tuple[int, int] | None:
    """`chunk_size` and `vectorize_up_to` of another study of the same problem, None without one."""
    wanted = spec.problem.model_dump(mode="json", exclude_none=True, exclude={*MEASURED})
    for study in find_studies(root):
        raw = tomllib.loads(study.spec_text)
        problem: dict[str, Any] = raw.get("problem", {})
        if not set(MEASURED) <= problem.keys():
            continue
        chunk_size, vectorize_up_to = (problem.pop(key) for key in MEASURED)
        same_kind = (raw.get("device"), raw.get("dtype")) == (spec.device, spec.dtype)
        if same_kind and problem == wanted:
            return chunk_size, vectorize_up_to
    return None


def take_over(study: StudyFolder, tasks: Sequence[Task]) -> list[Task]:
    """Copy the runs that another study in the same folder has done; returns the tasks left to do.

    The run's own folder must be there (`create_runs`) and not begun.
    """
    done = _done_elsewhere(study)
    left: list[Task] = []
    for task in tasks:
        run = study.run(task.seed, task.branch)
        source = done.get(_hash_of(run))
        if source is None or run.status() is not None or not _copied(source, run):
            left.append(task)
    return left


def _content(spec: Spec, branch: str, phases: Sequence[Any]) -> dict[str, Any]:
    return {
        "phases": [p.model_dump(mode="json", exclude={"name"}) for p in phases],
        "subspace": spec.of_branch(branch).subspace.model_dump(mode="json"),
    }


def _done_elsewhere(study: StudyFolder) -> dict[str, RunFolder]:
    found: dict[str, RunFolder] = {}
    for other in find_studies(study.path.parent):
        if other.path == study.path:
            continue
        for run in other.runs():
            status = run.status()
            if status is not None and status.state == "done":
                found.setdefault(_hash_of(run), run)
    found.pop("", None)
    return found


def _hash_of(run: RunFolder) -> str:
    try:
        return str(tomllib.loads(run.run_text).get("content_hash", ""))
    except (ThalwegError, OSError, tomllib.TOMLDecodeError):
        return ""


def _copied(source: RunFolder, run: RunFolder) -> bool:
    """Copy all that a run left; the status last, so that half a copy is not taken for a run."""
    try:
        with source.locked():
            names = [p.name for p in source.path.iterdir()]
            for name in sorted(names, key=lambda name: name == "status.json"):
                _copy(source.path / name, run.path / name)
    except ThalwegError:
        return False  # another process is at work there
    run.log(f"taken over from {source.path.parent.parent.name}, which has made the same run")
    return True


def _copy(source: Path, target: Path) -> None:
    if source.name == "run.toml" or "lock" in source.name:
        return
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    else:
        shutil.copy2(source, target)
