"""A study from its spec to its verdicts: run what is missing, judge, draw, report.

Example (a few minutes on two cores):

    >>> from thalweg.lab.study import reproduce       # doctest: +SKIP
    >>> result = reproduce(problem="digits")          # doctest: +SKIP
    >>> result.data.groupby("branch").loss.last()     # doctest: +SKIP

In a script, call it below `if __name__ == "__main__":`: the runs' processes import the script.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thalweg import registry
from thalweg.errors import Interrupted, InvalidInput, ThalwegError, invalid
from thalweg.lab.config import Spec, SplitSpec, check_names, load_spec, load_study
from thalweg.lab.execution.launched import launched, refuse_other_number, shared_by_launched
from thalweg.lab.execution.lockstep import runs_in_lockstep, usual_executor
from thalweg.lab.execution.machine import default_workers, resolve_device
from thalweg.lab.execution.schedule import Executor, Outcome, run_tasks
from thalweg.lab.execution.signs_of_life import HUNG_AFTER
from thalweg.lab.in_python import Study
from thalweg.lab.means import Means
from thalweg.lab.preparing import (
    PATHS,
    Plan,
    opened,
    planned,
    read_spec,
    study_path,
    with_absolute_paths,
)
from thalweg.lab.progress import Progress
from thalweg.lab.store import StudyFolder, load, open_study
from thalweg.lab.store.durable import full_disk_told, remove_unfinished
from thalweg.lab.store.lock import locked
from thalweg.lab.tables import parse_toml
from thalweg.lab.unregistered import require_registered
from thalweg.registry import load_plugin

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class StudyResult:
    """What a study gave.

    Attributes:
        study: its folder.
        conclusions: what was made of the measurements, by name; empty after an interruption.
        outcome: how the runs of this call ended.
    """

    study: StudyFolder
    conclusions: Mapping[str, Any]
    outcome: Outcome

    @property
    def verdicts(self) -> list[Any]:
        """A `Verdict` for each claim; none after an interruption."""
        return self.conclusions.get("verdicts", [])

    @property
    def figures(self) -> list[Path]:
        """The PNG files."""
        made = self.conclusions.get("figures")
        return [] if made is None else [saved.png for saved in made.saved]

    @property
    def report(self) -> Path | None:
        """The HTML page; None after an interruption."""
        return self.conclusions.get("report")

    @property
    def data(self) -> pandas.DataFrame:
        """All metrics, one row a measured step."""
        return load(self.study)

    @property
    def is_smoke(self) -> bool:
        """Whether everything was made tiny, so that no verdict is to be believed."""
        text = self.study.spec_text
        return parse_toml(text, str(self.study.spec_file)).get("smoke") is True

    @property
    def exit_code(self) -> int:
        """0: done; 75: interrupted; else the first failure's."""
        return self.outcome.exit_code


def reproduce(
    study: str = "main",
    problem: str | None = None,
    *,
    data_dir: str | None = None,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    **options: Any,
) -> StudyResult:
    """Reproduce a study of the paper on a problem; see `run` for the other options.

    Args:
        study: its name, see `builtin_studies`.
        problem: its name; default: the study's own, for most digits.
        data_dir: folder or file with the data; default: downloaded. Where the data set reads no
            files a warning, `NotNeeded`, says so.
        overrides: values by key path, or words of the command line.

    Raises:
        InvalidInput: an unknown study or problem, or a bad value.
    """
    spec = reproduction_spec(study, problem, data_dir=data_dir, overrides=overrides)
    return run(spec, **options)


def reproduction_spec(
    study: str,
    problem: str | None = None,
    *,
    data_dir: str | None = None,
    overrides: Mapping[str, Any] | Sequence[str] = (),
) -> Spec:
    """The spec that `reproduce` runs.

    Raises:
        InvalidInput: an unknown study or problem, or a bad value.
    """
    if data_dir is not None:
        if isinstance(overrides, Mapping):
            overrides = {"data_dir": data_dir, **overrides}
        else:
            overrides = ["--data-dir", data_dir, *overrides]
    return load_study(study, problem, overrides)


def run(
    study: Study | Spec | Path | str,
    *,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    root: Path | str = "runs",
    workers: int | None = None,
    plugins: Sequence[str] = (),
    executor: str | Executor | None = None,
    progress: Progress | None = None,
    retries: int = 0,
    hung_after: float = HUNG_AFTER,
) -> StudyResult:
    """Run what is missing of a study, then judge its claims, draw its figures, write its report.

    Called again with the same study it continues, or extends, what is in its folder.

    Args:
        study: a `lab.Study` of Python objects; or a TOML file, the name of a built-in spec, a spec.
        overrides: values by key path, or words of the command line; not with a spec.
        root: folder of all studies.
        workers: processes side by side; default: the usable cores over `spec.threads` on a CPU,
            one on a GPU.
        plugins: modules or files with the user's own problems and probes.
        executor: what runs the runs: "local", "lockstep", "inline", another registered name, or an
            executor; default: processes of this machine, in lockstep on a CUDA device and for what
            was begun so; or this process for a study of Python objects.
        progress: where to say how it goes; default: nowhere.
        retries: how often a run is begun again, from its last checkpoint, whose process was killed
            or hung; the other runs go on in either case.
        hung_after: minutes without a sign of life after which a process is ended; 0 for never.

    Raises:
        InvalidInput: an unknown probe or claim, data that cannot be read, k > P; another process
            is at work on the study.
        IntegrityError: the data has changed since the study was begun.
        ThalwegError: not enough room on the disk.
        DiskFull: the disk ran full on the way; called again, it goes on.
        Interrupted: stopped between the last run and the report; called again, it goes on.
    """
    for plugin in plugins:
        load_plugin(plugin)
    spec = shared_by_launched(with_absolute_paths(_spec_of(study, overrides)))
    progress = progress or Progress.silent()
    means = Means(workers, plugins, executor, progress, retries, hung_after)
    return _run_in(study_path(Path(root), spec), spec, means)


def resume(
    study: str | Path,
    *,
    root: Path | str = "runs",
    workers: int | None = None,
    plugins: Sequence[str] = (),
    executor: str | Executor | None = None,
    progress: Progress | None = None,
    retries: int = 0,
    hung_after: float = HUNG_AFTER,
) -> StudyResult:
    """Continue a study that was interrupted, or judge anew one that is done; see `run`.

    Raises:
        InvalidInput: also where a plugin is missing, which the message names if it is known.
    """
    for plugin in plugins:
        load_plugin(plugin)
    folder = open_study(study, root)
    require_registered(folder)
    progress = progress or Progress.silent()
    means = Means(workers, plugins, executor, progress, retries, hung_after)
    return _run_in(folder.path, read_spec(folder), means)


def conclude(study: StudyFolder, spec: Spec, outcome: Outcome | None = None) -> StudyResult:
    """Make of the measurements what is registered for it: verdicts, figures, a report.

    Raises:
        InvalidInput: an unknown claim; nothing has been measured yet.
        DiskFull: there is no room for a file; what was made before is whole.
    """
    check_spec(spec)
    if load(study).empty:
        raise InvalidInput(f"{study.path}: nothing has been measured yet; thalweg resume goes on")
    made: dict[str, Any] = {}
    with full_disk_told(study.path):
        for name, conclusion in registry.conclusions.items():
            made[name] = conclusion(study, spec, made)
    return StudyResult(study, made, outcome or Outcome())


def check_spec(spec: Spec) -> None:
    """Check the names that a spec uses for probes, claims, roles and figures.

    Raises:
        InvalidInput: one of them is unknown.
    """

    names = {kind: getattr(registry, kind) for kind in ("probes", "claims", "figures")}
    check_names(spec, **names)
    for use in spec.claim_uses:
        refuse_unknown_roles(registry.claims[use.name], use.roles)


def check_paths(spec: Spec) -> None:
    """Check that the files and folders that a spec names exist: that of its data, for one.

    Raises:
        InvalidInput: one does not.
    """
    data = spec.problem.data
    named = {f"problem.data.{key}": getattr(data, key, None) for key in PATHS}
    named["initial_checkpoint"] = spec.initial_checkpoint
    for key, path in named.items():
        if isinstance(path, str) and not _exists(path):
            raise invalid(key, path, "a file or folder that exists")


def _exists(path: str) -> bool:
    try:
        return Path(path).expanduser().exists()
    except (OSError, RuntimeError):  # no permission, a name too long, no such user
        return False


def refuse_unknown_roles(claim: Any, roles: Mapping[str, str]) -> None:
    """Refuse branches for roles that a claim does not have.

    Raises:
        InvalidInput: a role that is none of the claim's.
    """
    if unknown := [role for role in roles if role not in claim.needs_roles]:
        allowed = "branches for " + ", ".join(claim.needs_roles)
        raise invalid(f"roles of claim {claim.name!r}", ", ".join(unknown), allowed)


def roles_of(spec: Spec) -> dict[str, str]:
    """Which branch is the plain one, the dominant one and the bulk one, by what they do.

    The first of each, on the live basis of the study's own subspace.
    """
    wanted = {(1.0, 1.0): "plain", (1.0, 0.0): "dominant", (0.0, 1.0): "bulk"}
    roles: dict[str, str] = {}
    for name, branch in spec.branches.items():
        split = spec.branch_phase(name).split or SplitSpec()
        special = split.basis != "live" or split.metric != "euclidean" or branch.subspace
        special = special or split.is_scheduled or split.source is not None
        role = wanted.get((split.dominant, split.bulk))
        if role is not None and not special:
            roles.setdefault(role, name)
    return roles


def _spec_of(
    study: Study | Spec | Path | str, overrides: Mapping[str, Any] | Sequence[str]
) -> Spec:
    if isinstance(study, Spec):
        if overrides:
            raise invalid("overrides", list(overrides), "none with a spec, which has its values")
        return study
    return study.spec(overrides) if isinstance(study, Study) else load_spec(study, overrides)


def _run_in(path: Path, asked: Spec, means: Means) -> StudyResult:
    """Run what is missing in the folder at `path`, which may not exist yet."""
    check_spec(asked)
    group = launched()
    refuse_other_number(asked, group)
    device = resolve_device(asked.device)
    if group is None:
        return _run_here(path, asked, means, device)
    means.refuse_side_by_side()
    group.join(device)
    if not group.leads:
        study, outcome = group.follow(tuple(means.plugins))
        return StudyResult(study, {}, outcome)
    exit_code = 1
    try:
        result = _run_here(path, asked, replace(means, executor=group), device)
        exit_code = result.exit_code
        return result
    except ThalwegError as error:
        exit_code = error.exit_code
        raise
    finally:
        group.dismiss(exit_code)


def _run_here(path: Path, asked: Spec, means: Means, device: str) -> StudyResult:
    """The same by this process, which plans and writes."""
    if isinstance(means.executor, str):
        registry.executors.find(means.executor)  # an unknown one is refused before all else
    how = (means.plugins, device, means.progress)
    with full_disk_told(path):
        study, facts = opened(path, asked, *how, means.hung_after)
        # A second process is refused before it touches anything.
        with locked(study.path, "study"):
            remove_unfinished(study.path)
            plan = planned(study, asked, *how, facts, means.hung_after)
            outcome = _run_tasks(plan, means, device) if plan.tasks else Outcome()
            if outcome.interrupted and not outcome.exit_code:
                raise Interrupted("stopped on request; all runs are done, and the report is left")
            if outcome.interrupted or (plan.tasks and load(study).empty):
                return StudyResult(study, {}, outcome)
            return conclude(study, plan.spec, outcome)


def _run_tasks(plan: Plan, means: Means, device: str) -> Outcome:
    """Have the runs run, and say how it goes."""
    inline = plan.spec.holds_objects
    runs = [plan.study.run(task.seed, task.branch) for task in plan.tasks]
    usual = "inline" if inline else usual_executor(device, runs)
    executor = means.executor or usual
    workers = means.workers or default_workers(plan.spec.threads, device)
    alone = executor == "inline" or plan.spec.processes > 1
    workers = 1 if alone else min(workers, len(plan.tasks))
    progress, facts = means.progress, plan.facts
    assert facts is not None
    progress.begin(plan.study, plan.spec, plan.tasks, facts, workers, means.plugins, plan.space)
    if executor == "lockstep":
        progress.say(runs_in_lockstep(plan.tasks, lambda task: plan.spec))
    try:
        outcome = run_tasks(
            plan.study,
            plan.tasks,
            workers=workers,
            device=device,
            threads=plan.spec.threads,
            plugins=means.plugins,
            spec=plan.spec if inline else None,
            watch=progress.show,
            executor=executor,
            say=progress.warn,
            retries=means.retries,
            hung_after=means.hung_after,
            options=means.executor_options,
        )
    finally:
        progress.stop()
    progress.end(outcome)
    if not outcome.interrupted:
        progress.say("drawing figures, writing the report ...")
    return outcome
