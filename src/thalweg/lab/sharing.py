"""Which runs can be reused? A finished run of another study with the same content hash.

Two runs with one content hash make the same numbers, to the last bit on one kind of processor: same
problem, seed, device, the same phases, subspaces and probes all the way from the initial
parameters, and the same versions of what computes them.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from thalweg.errors import ThalwegError, invalid
from thalweg.lab.config import TRUNK, Spec
from thalweg.lab.config.former_keys import with_former_keys
from thalweg.lab.config.loading import MEASURED
from thalweg.lab.execution.schedule import Task, tasks_of
from thalweg.lab.store import RunFolder, StudyFolder, durable, find_studies
from thalweg.lab.store.checkpoint import list_checkpoints
from thalweg.lab.store.verifying import read_run_table, verify_run
from thalweg.lab.tables import parse_toml, stored_toml
from thalweg.registry import NAME_PATTERN

THEN = ", then "
"""Stands between what made the first steps of a run, or of those before it, and what the rest."""
LOCKSTEP = "lockstep-"
"""What the label of a group of runs that were computed together begins with, in what made them."""
UNKNOWN = "an unknown version"
SAME_AS = "same_as"
"""Key of `run.toml` that names a run of another study which makes the same, to be copied."""
PLANNED = "planned_hash"
"""Key of `run.toml`: the content hash that a run had before it was known to go in lockstep."""
_NAME = NAME_PATTERN.strip("^$")
_RUN_NAME = re.compile(rf"(?P<study>{_NAME})/seed-(?P<seed>\d+)/(?P<branch>{_NAME})")


def content_hash(spec: Spec, task: Task, fingerprint: str, maker: str) -> str:
    """64 hexadecimal digits of everything that determines a run's numbers.

    Args:
        fingerprint: of the data.
        maker: what computes the run, see `maker_of`.
    """
    chain: list[dict[str, Any]] = []
    branch: str | None = task.branch
    while branch is not None and branch != TRUNK:
        chain.append(_content(spec, branch, [spec.branch_phase(branch)]))
        branch = spec.before(branch)
    chain.append(_content(spec, TRUNK, spec.phases))
    kept = {"problem", "device", "dtype", "threads", "initial_checkpoint"}
    if spec.processes != 1:
        kept.add("processes")
    common = spec.model_dump(mode="json", include=kept)
    common["problem"]["data"].pop("data_dir", None)
    text = json.dumps([task.seed, fingerprint, maker, common, chain], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def this_maker(device: str, plugins: Sequence[str] = ()) -> str:
    """What computes runs here and now, beside their spec: versions, device, the user's own code.

    Args:
        device: what "auto" means here.
        plugins: as given to `load_plugin`, and loaded; a module's own file stands for it.

    Example:
        `this_maker("cpu")` is "thalweg 0.1.0, torch 2.13.0, cpu".
    """
    from thalweg import __version__

    parts = [f"thalweg {__version__}", f"torch {metadata.version('torch')}", device]
    for plugin in plugins:
        file = plugin if plugin.endswith(".py") else getattr(sys.modules[plugin], "__file__", None)
        content = b"" if file is None else Path(file).read_bytes()
        parts.append(f"{Path(plugin).name} {hashlib.sha256(content).hexdigest()[:8]}")
    return ", ".join(parts)


def plugins_in(study: StudyFolder) -> list[str]:
    """The names of the plugins that runs of a study were made with."""
    makers = [maker for run in study.runs() for maker in _read(run, "maker").split(THEN)]
    # After the versions of Thalweg and torch and the device: name and hash of each plugin.
    named = [part.rpartition(" ")[0] for maker in makers for part in maker.split(", ")[3:]]
    return list(dict.fromkeys(filter(None, named)))


def device_in(maker: str) -> str:
    """The device of what computes a run.

    Example:
        >>> device_in("thalweg 0.1.0, torch 2.12.0, cpu, then thalweg 0.1.0, torch 2.13.0, cuda")
        'cuda'
    """
    return maker.split(THEN)[-1].split(", ")[2]


def maker_of(study: StudyFolder, spec: Spec, task: Task, now: str, to_do: Sequence[Task]) -> str:
    """What computes a run, or has, all the way from the initial parameters.

    Args:
        now: what computes here.
        to_do: the runs that it will make, or continue.
    """
    run = study.run(task.seed, task.branch)
    if run.path.is_dir() and run.status() is not None:
        before = _read(run, "maker") or UNKNOWN
        # Whether it goes on in lockstep is found out when it does.
        goes_on = task in to_do and _by_itself(before.split(THEN)[-1]) != now
        return _then(before, now) if goes_on else before
    above = TRUNK if task.branch == TRUNK else spec.before(task.branch) or TRUNK
    if above == task.branch:
        return now
    return _then(maker_of(study, spec, Task(task.seed, above), now, to_do), now)


def note_maker(study: StudyFolder, spec: Spec, seed: int, branch: str, lockstep: str) -> None:
    """Write into `run.toml` what makes a run that begins or goes on now, where it is not planned.

    That is where runs compute together: their bits are those of one group of runs.

    Args:
        spec: of the study.
        lockstep: label of the group; empty: the run goes by itself.
    """
    run = study.run(seed, branch)
    if not (run.path / "run.toml").is_file():
        return
    table = stored_toml(run.run_text, run.path / "run.toml")
    known = str(table.get("maker", ""))
    own = _by_itself(known.split(THEN)[-1])
    own = f"{own}, {lockstep}" if lockstep else own
    if list_checkpoints(run.checkpoints):
        maker = _then(known, own)
    elif branch == TRUNK:
        maker = own
    else:
        maker = _then(_read(study.run(seed, spec.before(branch) or TRUNK), "maker"), own)
    if maker == known or not (known and LOCKSTEP in maker):
        return
    task = Task(seed, branch)
    table.setdefault(PLANNED, table["content_hash"])
    content = content_hash(spec, task, str(table.get("data_fingerprint", "")), maker)
    _write_anew(run, {**table, "maker": maker, "content_hash": content})


def lockstep_of(run: RunFolder) -> str:
    """The label of the group of runs that one was made with last; empty where it went by itself."""
    found = re.search(rf"{LOCKSTEP}\w+", _read(run, "maker").split(THEN)[-1])
    return found[0] if found else ""


def _by_itself(maker: str) -> str:
    """What computes, whether in lockstep or not; a maker that differs by that alone is the same.

    Example:
        >>> version = "thalweg 0.1, torch 2.13, cpu"
        >>> _by_itself(f"{version}, lockstep-1a2b, then {version}")
        'thalweg 0.1, torch 2.13, cpu'
    """
    parts = [re.sub(rf", {LOCKSTEP}\w+", "", part) for part in maker.split(THEN)]
    return THEN.join(part for n, part in enumerate(parts) if n == 0 or parts[n - 1] != part)


def made_otherwise(study: StudyFolder, tasks: Sequence[Task], now: str) -> str:
    """One line on those of the done runs that something else has computed; empty without any."""
    makers = [_read(study.run(task.seed, task.branch), "maker") or UNKNOWN for task in tasks]
    others = [maker for maker in map(_by_itself, makers) if maker != now]
    if not others:
        return ""
    by = "; ".join(dict.fromkeys(others))
    count = "1 run is" if len(others) == 1 else f"{len(others)} runs are"
    return f"{count} kept as made by {by}; this is {now}; another --root makes all anew"


def known_way_to_multiply(spec: Spec, root: Path) -> tuple[int, int] | None:
    """`chunk_size` and `vectorize_up_to` of another study of the same problem, None without one."""
    wanted = spec.problem.model_dump(mode="json", exclude_none=True, exclude={*MEASURED})
    for study in find_studies(root):
        try:
            raw = parse_toml(study.spec_text, str(study.spec_file))
        except (ThalwegError, OSError, ValueError):
            continue  # damaged: of no use here, and none of this study's business
        problem = raw.get("problem")
        if not isinstance(problem, dict) or not set(MEASURED) <= problem.keys():
            continue
        chunk_size, vectorize_up_to = (problem.pop(key) for key in MEASURED)
        same_kind = (raw.get("device"), raw.get("dtype")) == (spec.device, spec.dtype)
        if same_kind and problem == wanted:
            return chunk_size, vectorize_up_to
    return None


class FinishedRuns:
    """The runs below a folder that are done, by content hash; looked up once.

    Args:
        root: folder of all studies.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._found: dict[str, RunFolder] | None = None

    def same_as(self, run: RunFolder) -> RunFolder | None:
        """A done run with the same content hash, in another folder; None without one."""
        if self._found is None:
            self._found = _done_below(self._root)
        found = self._found.get(_hash_of(run))
        return None if found is None or found.path == run.path else found


@dataclass(frozen=True)
class KnownRuns:
    """What a study can have without computing it, beside other studies of one folder.

    Attributes:
        finished: the runs that are done.
        planned: which task makes a run, by content hash, where several studies are planned in turn.
    """

    finished: FinishedRuns
    planned: MutableMapping[str, Task] = field(default_factory=dict)


def take_over(
    study: StudyFolder, tasks: Sequence[Task], finished: FinishedRuns | None = None
) -> list[Task]:
    """Copy the runs that another study in the same folder has done; returns the tasks left to do.

    The run's own folder must be there (`create_runs`) and not begun.

    Args:
        finished: the runs to choose from; default: looked up now.
    """
    finished = finished or FinishedRuns(study.path.parent)
    left: list[Task] = []
    for task in tasks:
        run = study.run(task.seed, task.branch)
        source = None if run.status() is not None else finished.same_as(run)
        if source is None or not copied(source, run):
            left.append(task)
    return left


def copied(source: RunFolder, run: RunFolder) -> bool:
    """Copy all that a done run left into the folder of the same one; whether that was possible.

    It is verified first, to the last byte: what is damaged or another run's is made anew here. The
    status is copied last, so that half a copy is not taken for a run. What was planned as the same
    run and then made in lockstep is so here too, and `run.toml` says it.
    """
    try:
        status = source.status()
        is_same = bool(known := _hash_of(run)) and known in (
            _hash_of(source),
            _read(source, PLANNED),
        )
        if status is None or status.state != "done" or not is_same or run.status() is not None:
            return False
        with source.locked(), run.locked():
            if bad := _found_wrong(source, _read(run, "run_hash")):
                run.log(f"not taken over from {source.path}: {bad[0]}")
                return False
            if known != _hash_of(source):
                _write_maker_of(source, run)
            _copy_all(source.path, run.path)
    except (ThalwegError, OSError):
        return False  # another process is at work there, or it cannot be read
    run.log(f"taken over from {source.path.parent.parent.name}, which has made the same run")
    return True


def placed(
    study: StudyFolder, tasks: Sequence[Task], planned: MutableMapping[str, Task]
) -> list[Task]:
    """The tasks with their study; one that another study makes, too, is to be the same as that.

    The other one stands in `run.toml` as well, for processes that know the folder alone.
    """
    found: list[Task] = []
    for task in tasks:
        run = study.run(task.seed, task.branch)
        table = stored_toml(run.run_text, run.path / "run.toml")
        own = replace(task, study=study.path)
        first = planned.setdefault(str(table["content_hash"]), own)
        # One that is under way goes on, wherever that is.
        if first != own and run.status() is None:
            own = replace(own, same_as=first)
            assert first.study is not None
            _write_anew(run, {**table, SAME_AS: _name(first.study.name, first)})
        found.append(own)
    return found


def without_diverged(tasks: Sequence[Task], now: str) -> list[Task]:
    """The tasks without those that have diverged, and would again, and what waits for them.

    Args:
        tasks: with their study.
        now: what computes here: a run that another version has made may do better with this one.
    """
    gone = {task for task in tasks if _diverges_again(task, now)}
    while more := {t for t in tasks if t not in gone and t.needs in gone}:
        gone |= more
    return [task for task in tasks if task not in gone]


def _diverges_again(task: Task, now: str) -> bool:
    assert task.study is not None
    run = StudyFolder(task.study).run(task.seed, task.branch)
    status = run.status()
    diverged = status is not None and status.state == "diverged"
    return diverged and _by_itself(_read(run, "maker")) == now


def tasks_in_folder(study: StudyFolder, spec: Spec, seeds: Sequence[int]) -> list[Task]:
    """All runs of a planned study as tasks, by what their folders say.

    Raises:
        InvalidInput: the study has no such seed, or the seed's runs were not planned yet.
    """
    found: list[Task] = []
    for task in tasks_of(spec, seeds):
        run = study.run(task.seed, task.branch)
        if not (run.path / "run.toml").is_file():
            seeds_known = ", ".join(str(seed) for seed in spec.seeds)
            hint = f"plan it first, as with: thalweg resume {study.path}"
            raise invalid("seed", task.seed, f"one of {seeds_known}, planned", hint)
        table = read_run_table(run)
        found.append(replace(task, study=study.path, same_as=_same_as(study, table)))
    return found


def _same_as(study: StudyFolder, table: Mapping[str, Any]) -> Task | None:
    """The task that `run.toml` names as the same one, in a study beside this one."""
    named = _RUN_NAME.fullmatch(str(table.get(SAME_AS, "")))
    if named is None:
        return None
    return Task(int(named["seed"]), named["branch"], study=study.path.parent / named["study"])


def _name(study: str, task: Task) -> str:
    return f"{study}/seed-{task.seed}/{task.branch}"


def _content(spec: Spec, branch: str, phases: Sequence[Any]) -> dict[str, Any]:
    own = spec.of_branch(branch).model_dump(mode="json", include={"subspace", "probes"})
    tables = [with_former_keys(p.model_dump(mode="json", exclude={"name"})) for p in phases]
    return {"phases": tables, **own}


def _then(before: str, now: str) -> str:
    return before if before.split(THEN)[-1] == now else before + THEN + now


def _done_below(root: Path) -> dict[str, RunFolder]:
    found: dict[str, RunFolder] = {}
    for study in find_studies(root):
        for run in study.runs():
            try:
                status = run.status()
            except (ThalwegError, OSError):
                continue  # damaged: of no use here, and none of this study's business
            if status is not None and status.state == "done":
                found.setdefault(_hash_of(run), run)
    found.pop("", None)
    return found


def _hash_of(run: RunFolder) -> str:
    return _read(run, "content_hash")


def _read(run: RunFolder, key: str) -> str:
    """A value of a run's `run.toml`, empty where it is not there."""
    try:
        return str(stored_toml(run.run_text, run.path / "run.toml").get(key, ""))
    except (ThalwegError, OSError, ValueError):
        return ""


def _found_wrong(source: RunFolder, identity: str) -> list[str]:
    """What is wrong with a run that says it is done."""
    found: list[str] = []
    verify_run(source, identity, lambda _, what: found.append(str(what)))
    return found


def _write_maker_of(source: RunFolder, run: RunFolder) -> None:
    table = stored_toml(run.run_text, run.path / "run.toml")
    own = {key: _read(source, key) for key in ("maker", "content_hash", PLANNED)}
    _write_anew(run, {**table, **own})


def _write_anew(run: RunFolder, table: Mapping[str, Any]) -> None:
    """Write the `run.toml` of a run."""
    import tomli_w

    run.write_run_text(tomli_w.dumps(table))


def _copy_all(source: Path, target: Path) -> None:
    """Copy a run's files into a run's folder, or leave none there: not half a run."""
    names = [p.name for p in source.iterdir() if p.name != "run.toml" and "lock" not in p.name]
    try:
        for name in sorted(names, key=lambda name: name == "status.json"):
            _copy(source / name, target / name)
    except BaseException:
        for name in names:
            durable.remove(target / name)
        raise


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    else:
        shutil.copy2(source, target)
