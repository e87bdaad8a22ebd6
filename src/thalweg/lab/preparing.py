"""Which folder does a study live in, what is done there, what is missing, how much will it write?

The folder's name holds a hash of everything that determines the numbers. So the same settings land
in the same folder: a second call resumes or extends what is there, and nothing is overwritten.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from thalweg.errors import IntegrityError, InvalidInput
from thalweg.lab.config import TRUNK, Spec, dump_spec, parse_spec, spec_hash
from thalweg.lab.execution.schedule import Task, longest_first, tasks_of
from thalweg.lab.execution.signs_of_life import HUNG_AFTER
from thalweg.lab.identity import bound_of, run_hash
from thalweg.lab.problem_facts import ProblemFacts, examine, with_way_to_multiply
from thalweg.lab.progress import Progress
from thalweg.lab.sharing import (
    KnownRuns,
    content_hash,
    known_way_to_multiply,
    made_otherwise,
    maker_of,
    placed,
    take_over,
    this_maker,
)
from thalweg.lab.store import RunFolder, StudyFolder, check_disk, estimate_disk
from thalweg.lab.store.belonging import FORMAT
from thalweg.lab.store.checkpoint import list_checkpoints, read_mark
from thalweg.lab.store.links import leads_outside, refuse_foreign_entries
from thalweg.lab.store.verifying import check_done, read_run_table
from thalweg.lab.tables import parse_toml, stored_toml
from thalweg.lab.unregistered import require_registered

Model = TypeVar("Model", bound=BaseModel)
PATHS = ("data_dir", "vocabulary_file")
"""Settings of data sets that are paths."""
TRACKER_BLOCKS = 8
"""Blocks (P, k) in a tracker's state: two references of three, basis, the basis before."""


@dataclass(frozen=True)
class Plan:
    """What is to be done of a study.

    Attributes:
        study: its folder.
        spec: what it was begun with, and is extended to.
        tasks: the runs that are left to do, in the order in which they should begin.
        facts: what is known about the problem; None where nothing is to do.
        space: a sentence on the disk space that they need.
        disk: the same in bytes, from above.
    """

    study: StudyFolder
    spec: Spec
    tasks: list[Task]
    facts: ProblemFacts | None
    space: str
    disk: int = 0


def study_name(spec: Spec) -> str:
    """The name of a study's folder."""
    return f"{spec.name}-{spec.problem.data.registered_name}-{spec_hash(spec)}"


def study_path(root: Path, spec: Spec, label: str = "") -> Path:
    """Where a study is, or is to be.

    It is found by the hash at the end of its folder's name, so that it is the same one whether it
    was begun alone or as a point of a sweep.

    Args:
        label: stands in the name of a new folder, before the hash, such as "lr-0.1".
    """
    start, _, digits = study_name(spec).rpartition("-")
    for found in sorted(root.glob(f"{escape(start)}-*{digits}")):
        if StudyFolder(found).exists:
            return found
    return root / "-".join(part for part in (start, label, digits) if part)


def read_spec(study: StudyFolder) -> Spec:
    """The spec that a study was begun with, and extended to.

    Raises:
        InvalidInput: it names what is not registered, such as a plugin's data set.
    """
    source = str(study.spec_file)
    with warnings.catch_warnings():
        # Former names of keys are no mistake of whoever reads a folder that was written before.
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            return parse_spec(parse_toml(study.spec_text, source), source=source)
        except InvalidInput:
            require_registered(study)
            raise


def with_absolute_paths(spec: Spec) -> Spec:
    """The spec with paths that hold wherever it is resumed from."""
    data = spec.problem.data
    found: dict[str, Any] = {
        name: _absolute(value)
        for name in PATHS
        if isinstance(value := getattr(data, name, None), str)
    }
    spec = _updated(spec, problem=_updated(spec.problem, data=_updated(data, **found)))
    if spec.initial_checkpoint is not None:
        spec = _updated(spec, initial_checkpoint=_absolute(spec.initial_checkpoint))
    return spec


def merged(study: StudyFolder, asked: Spec) -> tuple[Spec, list[str]]:
    """The spec of a study that is there already and is asked for again, and remarks for people.

    Seeds are added, branches are extended. What is done stays: a branch that has made more steps
    than are asked for now keeps its end.
    """
    known = read_spec(study)
    check_spec_of_folder(study, known, spec_hash(asked))
    spec = with_way_to_multiply(asked, known.problem.chunk_size, known.problem.vectorize_up_to)
    spec = _updated(spec, seeds=tuple(sorted({*known.seeds, *asked.seeds})))
    remarks: list[str] = []
    branches = dict(spec.branches)
    for name in spec.branches:
        now, before = asked.branch_phase(name), known.branch_phase(name)
        shorter = now.steps is not None and before.steps is not None and now.steps < before.steps
        done = [seed for seed in known.seeds if _state(study, Task(seed, name)) == "done"]
        if shorter and done:
            branches[name] = _updated(branches[name], steps=before.steps, epochs=None)
            remarks.append(
                f"{name}: {before.steps} steps are done already, and kept; {now.steps} were asked"
            )
    return _updated(spec, branches=branches), remarks


def opened(
    path: Path,
    asked: Spec,
    plugins: Sequence[str],
    device: str,
    progress: Progress,
    hung_after: float = HUNG_AFTER,
) -> tuple[StudyFolder, ProblemFacts | None]:
    """The folder of a study, made where it is not there; and what was found out for that.

    Args:
        hung_after: see `examine`.

    Raises:
        InvalidInput: something cannot be built; no folder is left behind then.
    """
    if path.is_dir():
        if leads_outside(path, path.parent):
            raise IntegrityError(
                f"{path}: is a link out of {path.parent}; to go on with that study: thalweg resume"
                f" {path.resolve()}"
            )
        refuse_foreign_entries(path)
    if (study := StudyFolder(path)).exists:
        return study, None
    known = known_way_to_multiply(asked, path.parent)
    asked = with_way_to_multiply(asked, *known) if known else asked
    facts = _examined(asked, plugins, device, progress, hung_after)
    asked = with_way_to_multiply(asked, facts.chunk_size, facts.vectorize_up_to)
    return StudyFolder.create(path.parent, path.name, dump_spec(asked)), facts


def planned(
    study: StudyFolder,
    asked: Spec,
    plugins: Sequence[str],
    device: str,
    progress: Progress,
    facts: ProblemFacts | None = None,
    hung_after: float = HUNG_AFTER,
    known: KnownRuns | None = None,
) -> Plan:
    """What is left to do of a study, each of its runs with a folder.

    Args:
        facts: of the problem, where they are known already.
        hung_after: see `examine`.
        known: where several studies are planned in turn; the tasks name their study then.

    Raises:
        InvalidInput: something cannot be built.
        IntegrityError: the data has changed since the study was begun.
        ThalwegError: not enough room on the disk.
    """
    spec, remarks = merged(study, asked)
    for remark in remarks:
        progress.say(remark)
    if (text := dump_spec(spec)) != study.spec_text:
        study.write_spec_text(text)
    every, maker = tasks_of(spec, asked.seeds), this_maker(device, plugins)
    check_done_runs(study, spec, every)
    tasks = [task for task in every if is_missing(study, spec, task)]
    if remark := made_otherwise(study, [task for task in every if task not in tasks], maker):
        progress.say(remark)
    if not tasks:
        progress.say(f"{study.path}: all runs are done")
        return Plan(study, spec, [], facts, "")
    facts = facts or _examined(spec, plugins, device, progress, hung_after)
    check_data(study, facts.fingerprint)
    disk = disk_of(spec, tasks, facts)
    space = check_disk(study.path, disk)
    study.record_environment()
    create_runs(study, spec, every, facts.fingerprint, maker, tasks)
    left = take_over(study, tasks, None if known is None else known.finished)
    if shared := len(tasks) - len(left):
        progress.say(f"{shared} runs are taken over from other studies, which have made them")
    if known is not None:
        left = placed(study, left, known.planned)
    return Plan(study, spec, longest_first(spec, left, facts.num_samples), facts, space, disk)


def check_spec_of_folder(study: StudyFolder, spec: Spec, wanted: str = "") -> None:
    """Check that `spec.toml` is what the folder and its runs were made with.

    Args:
        spec: as `spec.toml` says.
        wanted: the hash that the folder stands for; empty: that of its runs alone is compared.

    Raises:
        IntegrityError: it is not; or a run's folder stands in another one's place.
    """
    file = study.spec_file
    hint = f"restore it from a copy, or: thalweg check {study.path} --repair"
    if wanted and spec_hash(spec) != wanted:
        raise IntegrityError(
            f"{file}: its settings are not those of its folder: hash {spec_hash(spec)}, and"
            f" {wanted} is wanted; {hint}"
        )
    for run in study.runs():
        table = read_run_table(run)
        recorded = table.get("run_hash", "")
        is_known = run.branch == TRUNK or run.branch in spec.branches
        if recorded and (not is_known or recorded != hash_of_run(spec, run, table)):
            raise IntegrityError(
                f"{file}: its settings are not those that seed {run.seed} {run.branch} was begun"
                f" with, see {run.path / 'run.toml'}: one of the two was changed; {hint}"
            )


def hash_of_run(spec: Spec, run: RunFolder, table: Mapping[str, Any]) -> str:
    """The hash of a run by the spec, with the data that its `run.toml` names."""
    return run_hash(spec, run.seed, run.branch, str(table.get("data_fingerprint", "")))


def check_done_runs(study: StudyFolder, spec: Spec, tasks: Sequence[Task]) -> None:
    """Check that those of the runs that say so are done.

    Raises:
        IntegrityError: one is not, or a file of it is missing or of another run.
    """
    for task in tasks:
        run = study.run(task.seed, task.branch)
        status = run.status() if (run.path / "run.toml").is_file() else None
        if status is not None and status.state == "done":
            check_done(run, status, hash_of_run(spec, run, read_run_table(run)))


def create_runs(
    study: StudyFolder,
    spec: Spec,
    tasks: Sequence[Task],
    fingerprint: str,
    maker: str,
    to_do: Sequence[Task],
) -> None:
    """Write each run's part of the spec into its folder.

    Args:
        fingerprint: of the data.
        maker: what computes now, see `this_maker`.
        to_do: those of the tasks that it will make; the others stay what another one has made.
    """
    for task in tasks:
        run = study.run(task.seed, task.branch)
        by = maker_of(study, spec, task, maker, to_do)
        text = _run_text(spec, task, fingerprint, by)
        if (run.path / "run.toml").is_file():
            if run.run_text != text:
                run.write_run_text(text)
        else:
            run.create(text)


def check_data(study: StudyFolder, fingerprint: str) -> None:
    """Check that the data is what the study's earlier runs were made with.

    Args:
        fingerprint: of the data now.

    Raises:
        IntegrityError: it is not.
    """
    for run in study.runs():
        text = stored_toml(run.run_text, run.path / "run.toml")
        known = str(text.get("data_fingerprint", fingerprint))
        if known != fingerprint:
            raise IntegrityError(
                f"{run.path}: was made with other data (SHA-256 of the samples {known[:12]}..., now"
                f" {fingerprint[:12]}...); bring the files back, or choose another --root"
            )


def disk_of(spec: Spec, tasks: Sequence[Task], facts: ProblemFacts) -> int:
    """Bytes that the runs of these tasks leave, from above."""
    # A branch point is a vector and a basis more; what is found for branches is a tracker more.
    vectors = facts.optimizer_vectors + 1 + (0 if spec.subspace.source == "random" else 1)
    total = 0
    for task in tasks:
        steps, probes = task.most_steps(spec, facts.num_samples), spec.of_branch(task.branch).probes
        sources = [phase.split.source for phase in task.phases(spec) if phase.split is not None]
        window = max((s.window + s.k for s in sources if s is not None), default=0)
        regular = steps // spec.checkpoint.every_steps + 1
        total += estimate_disk(
            facts.num_parameters,
            facts.k,
            vectors + window,
            spec.checkpoint.keep + 1 + int(spec.hands_over_branch_point(task.branch)),
            steps // min(probes.values(), default=steps) + 2,
            4 * len(probes) + 5 * facts.k,
            regular if spec.checkpoint.save_bases else 0,
            bases_per_checkpoint=TRACKER_BLOCKS + 1,
            bytes_per_number=8 if spec.dtype == "float64" else 4,
        )
    return total


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def _updated(model: Model, **changed: Any) -> Model:
    return model.model_copy(update=changed) if changed else model


def _state(study: StudyFolder, task: Task) -> str:
    run = study.run(task.seed, task.branch)
    status = run.status() if run.path.is_dir() else None
    return "waiting" if status is None else status.state


def _examined(
    spec: Spec, plugins: Sequence[str], device: str, progress: Progress, hung_after: float
) -> ProblemFacts:
    progress.say("building the problem ...")
    return examine(spec, plugins, device, inline=spec.holds_objects, hung_after=hung_after)


def is_missing(study: StudyFolder, spec: Spec, task: Task) -> bool:
    """Whether a run is not done, or its bound was raised since."""
    return _state(study, task) != "done" or _is_extended(study, spec, task)


def _is_extended(study: StudyFolder, spec: Spec, task: Task) -> bool:
    """Whether the bound of a branch is another one than the run was done with."""
    if task.branch == TRUNK:
        return False
    run, now = study.run(task.seed, task.branch), spec.branch_phase(task.branch)
    checkpoints = list_checkpoints(run.checkpoints)
    # What it was done with; run.toml says what it is to be done with, even before it is.
    if checkpoints and (bound := read_mark(checkpoints[-1]).bound):
        return bound != bound_of(now)
    phases = stored_toml(run.run_text, run.path / "run.toml").get("phases")
    before = phases[0] if isinstance(phases, list) and phases else None
    if not isinstance(before, dict):
        raise IntegrityError(f"{run.path / 'run.toml'}: damaged, it has no phases")
    return (before.get("steps"), before.get("epochs")) != (now.steps, now.epochs)


def _run_text(spec: Spec, task: Task, fingerprint: str, maker: str) -> str:
    import tomli_w

    content = {
        "seed": task.seed,
        "branch": task.branch,
        "format": FORMAT,
        **({} if task.branch == TRUNK else {"after": task.after}),
        "data_fingerprint": fingerprint,
        "run_hash": run_hash(spec, task.seed, task.branch, fingerprint),
        "maker": maker,
        "content_hash": content_hash(spec, task, fingerprint, maker),
        "phases": [p.model_dump(mode="json", exclude_none=True) for p in task.phases(spec)],
    }
    return tomli_w.dumps(content)
