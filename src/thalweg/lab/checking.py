"""Is all of a study what was written, and how does a damaged one go back to its newest good state?

`check` reads every byte and changes nothing. `repair` moves what is bad into the study's folder
`set-aside-<time>`, with the same places in it; nothing is deleted. `thalweg resume` then runs again
what is missing, from the newest good checkpoint or from the start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from thalweg.errors import IntegrityError, ThalwegError
from thalweg.lab.config import TRUNK, Spec
from thalweg.lab.execution.schedule import tasks_of
from thalweg.lab.preparing import create_runs, hash_of_run, read_spec
from thalweg.lab.sharing import UNKNOWN
from thalweg.lab.store import RunFolder, Status, StudyFolder, durable
from thalweg.lab.store.checkpoint import list_checkpoints, read_mark
from thalweg.lab.store.links import ASIDE, describe_foreign, foreign_entries
from thalweg.lab.store.lock import is_locked, locked
from thalweg.lab.store.metrics import list_segments
from thalweg.lab.store.verifying import Verified, read_run_table, step_of, verify_run
from thalweg.lab.tables import parse_toml


@dataclass(frozen=True)
class Finding:
    """A file or folder that is not what was written, and one line on it."""

    path: Path
    what: str


@dataclass
class Checked:
    """What was found out about a study.

    Attributes:
        runs: how many were looked at.
        findings: what is bad.
        notes: what cannot be verified; no fault.
        verified: of each run, what of it is good.
    """

    runs: int = 0
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    verified: dict[RunFolder, Verified] = field(default_factory=dict)

    def say(self, path: Path, what: object) -> None:
        """Add a finding."""
        self.findings.append(Finding(path, " ".join(str(what).split())))

    def of(self, folder: Path) -> list[Finding]:
        """The findings in a folder."""
        return [found for found in self.findings if found.path.is_relative_to(folder)]


def check(study: StudyFolder) -> Checked:
    """Verify every file of a study: formats, hashes, digests, rows without gaps.

    Raises:
        InvalidInput: a later version of Thalweg wrote a file; the spec names what is not
            registered, such as a plugin's data set.
    """
    checked = Checked()
    for path in foreign_entries(study.path):
        checked.say(path, describe_foreign(path))
    if checked.findings:
        return checked  # before anything is opened
    spec = _spec_of(study, checked)
    for name, read in (
        ("env.json", study.environments),
        ("verdicts.json", study.read_verdicts),
    ):
        try:
            read()
        except (IntegrityError, OSError) as error:
            checked.say(study.path / name, error)
    runs = _run_folders(study)
    # First, since one edited spec would make every run look like another one's.
    known = {run: _identity(study, spec, run, checked) for run in runs}
    for run in runs:
        checked.runs += 1
        where = f"seed {run.seed} {run.branch}"
        if is_locked(run.path):
            checked.notes.append(f"{where}: running now, not checked")
            continue
        verified = verify_run(run, known[run], checked.say)
        checked.verified[run] = verified
        if not verified.is_marked:
            checked.notes.append(f"{where}: not verifiable: its files do not say whose they are")
    return checked


def repair(study: StudyFolder) -> tuple[Checked, list[str]]:
    """Go back to the newest good state of a study: move what is bad aside.

    Returns:
        What was found, and a line for each thing done or to be done.

    Raises:
        InvalidInput: a process is at work on the study; a later version wrote a file.
    """
    aside = study.path / (ASIDE + datetime.now(UTC).strftime("%Y%m%dT%H%M%S%fZ"))
    foreign = foreign_entries(study.path)
    for path in foreign:
        _move(study, path, aside)  # the link itself; not even the lock is safe to open before
    with locked(study.path, "study"):
        checked = check(study)
        if not checked.findings and not foreign:
            return checked, []
        done = [
            line
            for run, verified in checked.verified.items()
            if checked.of(run.path)
            for line in _repair_run(study, run, verified, checked, aside)
        ]
        _write_run_tables(study, checked)
        for found in checked.findings:
            if found.path.parent == study.path and found.path.exists():
                _move(study, found.path, aside)
        for path in foreign:
            checked.say(path, f"{path}: was a link, a pipe or a device")
        done.append(f"what was bad is in {aside}")
        if study.exists:
            done.append(f"to run again what is missing: thalweg resume {study.path}")
        else:
            done.append(
                "spec.toml is written anew by the command that the study was begun with (thalweg"
                " run or reproduce, with the same settings and --root), which goes on with its runs"
            )
        return checked, done


def _spec_of(study: StudyFolder, checked: Checked) -> Spec | None:
    """The spec; None where `spec.toml` is damaged."""
    file = study.spec_file
    try:
        table = parse_toml(study.spec_text, "spec.toml")
    except (ThalwegError, OSError, ValueError) as error:
        checked.say(file, f"{file}: damaged, no TOML ({error})")
        return None
    if not {"problem", "phases"} <= table.keys():
        checked.say(file, f"{file}: damaged, its end is missing")
        return None
    return read_spec(study)


def _run_folders(study: StudyFolder) -> list[RunFolder]:
    """The folders of runs, also those whose `run.toml` is missing."""
    parts = ("run.toml", "status.json", "checkpoints/step-*", "metrics/segment-*")
    found = {
        RunFolder(path)
        for path in study.path.glob("seed-*/*")
        if path.parent.name.removeprefix("seed-").isdigit()
        and any(any(path.glob(part)) for part in parts)
    }
    return sorted(found, key=lambda run: (run.seed, run.branch != TRUNK, run.branch))


def _identity(study: StudyFolder, spec: Spec | None, run: RunFolder, checked: Checked) -> str:
    """The hash of a run; empty where it is not known."""
    try:
        table = read_run_table(run)
    except IntegrityError as error:
        checked.say(run.path / "run.toml", error)
        is_known = spec is not None and (run.branch == TRUNK or run.branch in spec.branches)
        return hash_of_run(spec, run, _data_of(study)) if spec and is_known else ""
    recorded = str(table.get("run_hash", ""))
    if spec is None:
        return recorded
    is_known = run.branch == TRUNK or run.branch in spec.branches
    wanted = hash_of_run(spec, run, table) if is_known else ""
    if recorded in ("", wanted):
        return wanted
    file = study.spec_file
    if wanted and wanted in _said_by_files(run):
        file, recorded = run.path / "run.toml", wanted
    elif wanted and hash_of_run(spec, run, _data_of(study, run)) == recorded:
        file = run.path / "run.toml"  # its fingerprint of the data is not the other runs'
    if not checked.of(file):
        checked.say(file, f"{file}: was changed since seed {run.seed} {run.branch} was begun")
    return recorded


def _data_of(study: StudyFolder, but: RunFolder | None = None) -> dict[str, str]:
    """What a `run.toml` says of the data: that of any run, since all of a study are of one.

    Args:
        but: a run that is not asked.
    """
    for run in study.runs():
        if run == but:
            continue
        try:
            return {"data_fingerprint": read_run_table(run)["data_fingerprint"]}
        except (IntegrityError, KeyError):
            continue
    return {}


def _said_by_files(run: RunFolder) -> set[str]:
    """The hashes that checkpoints say."""
    found: set[str] = set()
    for path in list_checkpoints(run.checkpoints):
        try:
            found.add(read_mark(path).run)
        except IntegrityError:
            continue
    return found


def _repair_run(
    study: StudyFolder, run: RunFolder, verified: Verified, checked: Checked, aside: Path
) -> list[str]:
    """Take a run back to its newest good checkpoint, or to its start; return what was done."""
    with run.locked():
        start = _newest_good(run, verified)
        kept = (
            set() if start is None else {p for p in verified.marks if step_of(p) <= step_of(start)}
        )
        good = {piece.segment.path for piece in verified.pieces} if start is not None else set()
        bad = [path for path in list_checkpoints(run.checkpoints) if path not in kept]
        bad += [s.path for s in list_segments(run.metrics) if s.path not in good]
        bad += [run.path / "status.json"]
        bad += [found.path for found in checked.of(run.path) if found.path.name == "run.toml"]
        for path in bad:
            if path.exists():
                _move(study, path, aside)
        where = f"seed {run.seed} {run.branch}"
        if start is None:
            return [f"{where}: will be run again from its start"]
        step = step_of(start)
        message = f"taken back to step {step} by thalweg check --repair"
        run.write_status(Status("interrupted", step=step, message=message, run_hash=verified.run))
        run.log(message)
        return [f"{where}: will be run again from step {step}"]


def _write_run_tables(study: StudyFolder, checked: Checked) -> None:
    """Write `run.toml` anew for runs that have lost it and go on."""
    lost = [
        run
        for run in _run_folders(study)
        if not (run.path / "run.toml").exists() and checked.of(run.path)
    ]
    if not lost or checked.of(study.spec_file):
        return
    spec, data = read_spec(study), _data_of(study).get("data_fingerprint", "")
    every = {(task.seed, task.branch): task for task in tasks_of(spec)}
    tasks = [every[key] for run in lost if (key := (run.seed, run.branch)) in every]
    create_runs(study, spec, tasks, data, UNKNOWN, [])


def _newest_good(run: RunFolder, verified: Verified) -> Path | None:
    """The newest good checkpoint before which all that was measured is there."""
    good = {piece.segment for piece in verified.pieces}
    lost = min((s.first for s in list_segments(run.metrics) if s not in good), default=None)
    for path in sorted(verified.marks, key=step_of, reverse=True):
        rows = verified.marks[path].rows
        is_whole = rows is None or rows == verified.rows_before(step_of(path))
        if is_whole and (lost is None or step_of(path) <= lost):
            return path
    return None


def _move(study: StudyFolder, path: Path, aside: Path) -> None:
    """Move a file or folder aside, into the same place there, or into one beside it if taken."""
    target = place = aside / path.relative_to(study.path)
    number = 1
    while target.exists() or target.is_symlink():
        number += 1
        target = place.with_name(f"{place.name}-{number}")
    durable.make_folder(target.parent)
    durable.rename(path, target)


def summary(study: StudyFolder, checked: Checked, done: Sequence[str]) -> list[str]:
    """What people should know at the end."""
    count = f"{checked.runs} runs" if checked.runs != 1 else "1 run"
    lines = [*checked.notes, *done]
    if checked.findings and not done:
        lines.append(f"to go back to the newest good state: thalweg check {study.path} --repair")
    if not checked.findings:
        lines.append(f"{study.path}: {count} checked, nothing wrong")
    return lines
