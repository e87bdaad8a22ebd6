"""A study from its spec to its verdicts: run what is missing, judge, draw, report.

Example (a few minutes on two cores):

    >>> from thalweg.lab.study import reproduce       # doctest: +SKIP
    >>> result = reproduce(problem="digits")          # doctest: +SKIP
    >>> result.data.groupby("branch").loss.last()     # doctest: +SKIP

In a script, call it below `if __name__ == "__main__":`: the runs' processes import the script.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thalweg.errors import InvalidInput, invalid
from thalweg.lab.claims import CLAIMS, ClaimUse, Verdict, judge_all
from thalweg.lab.claims.verdicts import verdicts_to_json
from thalweg.lab.machine import default_workers, resolve_device
from thalweg.lab.preparing import (
    check_data,
    create_runs,
    disk_of,
    merged,
    missing_tasks,
    read_spec,
    study_name,
    with_absolute_paths,
    with_way_to_multiply,
)
from thalweg.lab.problem_facts import ProblemFacts, examine
from thalweg.lab.progress import Progress
from thalweg.lab.registry import load_plugin
from thalweg.lab.schedule import Outcome, longest_first, run_tasks, tasks_of
from thalweg.lab.sharing import (
    known_way_to_multiply,
    made_otherwise,
    take_over,
    this_maker,
)
from thalweg.lab.spec import Spec, SplitSpec, check_names, dump_spec, load_study
from thalweg.lab.store import StudyFolder, check_disk, load, open_study
from thalweg.lab.store.lock import locked

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class StudyResult:
    """What a study gave.

    Attributes:
        study: its folder.
        verdicts: one for each claim; none after an interruption.
        report: the HTML page; None after an interruption.
        figures: the PNG files.
        outcome: how the runs of this call ended.
    """

    study: StudyFolder
    verdicts: list[Verdict]
    report: Path | None
    figures: list[Path]
    outcome: Outcome

    @property
    def data(self) -> pandas.DataFrame:
        """All metrics, one row a measured step."""
        return load(self.study)

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
    """Reproduce a study of the paper on a problem; see `run_study` for the other options.

    Args:
        study: its name, see `builtin_studies`.
        problem: its name; default: digits, or the one that the study itself has.
        data_dir: folder or file with the data; default: downloaded.
        overrides: values by key path, or words of the command line.

    Raises:
        InvalidInput: an unknown study or problem, or a bad value.
    """
    spec = reproduction_spec(study, problem, data_dir=data_dir, overrides=overrides)
    return run_study(spec, **options)


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
            overrides = {"problem.data.data_dir": data_dir, **overrides}
        else:
            overrides = ["--problem.data.data_dir", data_dir, *overrides]
    return load_study(study, problem, overrides)


def run_study(
    spec: Spec,
    *,
    root: Path | str = "runs",
    workers: int | None = None,
    plugins: Sequence[str] = (),
    progress: Progress | None = None,
) -> StudyResult:
    """Run what is missing of a study, then judge its claims, draw its figures, write its report.

    Args:
        spec: what to do.
        root: folder of all studies.
        workers: processes side by side; default: the usable cores over `spec.threads` on a CPU,
            one on a GPU.
        plugins: modules or files with the user's own problems and probes.
        progress: where to say how it goes; default: nowhere.

    Raises:
        InvalidInput: an unknown probe or claim, data that cannot be read, k > P; another process
            is at work on the study.
        IntegrityError: the data has changed since the study was begun.
        ThalwegError: not enough room on the disk.
    """
    for plugin in plugins:
        load_plugin(plugin)
    spec = with_absolute_paths(spec)
    return _run_in(Path(root) / study_name(spec), spec, workers, plugins, progress)


def resume(
    study: str | Path,
    *,
    root: Path | str = "runs",
    workers: int | None = None,
    plugins: Sequence[str] = (),
    progress: Progress | None = None,
) -> StudyResult:
    """Go on with a study that was interrupted, or judge anew one that is done; see `run_study`."""
    for plugin in plugins:
        load_plugin(plugin)
    folder = open_study(study, root)
    return _run_in(folder.path, read_spec(folder), workers, plugins, progress)


def conclude(study: StudyFolder, spec: Spec, outcome: Outcome | None = None) -> StudyResult:
    """Judge the claims on what has been measured, draw the figures, write the report.

    Raises:
        InvalidInput: an unknown claim; nothing has been measured yet.
    """
    from thalweg.lab.figures import save_figures
    from thalweg.lab.report import write_report

    check_spec(spec)
    data = load(study)
    if data.empty:
        raise InvalidInput(f"{study.path}: nothing has been measured yet; thalweg resume goes on")
    roles = roles_of(spec)
    uses = [ClaimUse(CLAIMS[use.name], use.roles) for use in spec.claim_uses]
    verdicts = judge_all(uses, data, roles)
    study.write_verdicts(json.loads(verdicts_to_json(verdicts)))
    figures = save_figures(data, study.path / "figures", roles, spec.figures)
    report = write_report(
        study.path,
        data,
        verdicts,
        study.spec_text,
        study.environments()[-1],
        figures,
        title=f"{spec.name} on {spec.problem.data.registered_name}",
        roles=roles,
        command=f"thalweg run {study.path / 'spec.toml'}",
    )
    paths = [saved.png for saved in figures.saved]
    return StudyResult(study, verdicts, report, paths, outcome or Outcome())


def check_spec(spec: Spec) -> None:
    """Check the names that a spec uses for probes, claims, roles and figures.

    Raises:
        InvalidInput: one of them is unknown.
    """
    from thalweg.dynamics import PROBES
    from thalweg.lab.figures import FIGURES

    check_names(spec, probes=PROBES, claims=CLAIMS, figures=FIGURES)
    for use in spec.claim_uses:
        ClaimUse(CLAIMS[use.name], use.roles)


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


def _run_in(
    path: Path,
    asked: Spec,
    workers: int | None,
    plugins: Sequence[str],
    progress: Progress | None,
) -> StudyResult:
    """Run what is missing in the folder at `path`, which may not exist yet."""
    if workers is not None and workers < 1:
        raise invalid("workers", workers, "an integer >= 1")
    progress = progress or Progress.silent()
    check_spec(asked)
    device = resolve_device(asked.device)
    facts = None
    if not (path / "spec.toml").is_file():
        # Built first: what cannot be built leaves no folder behind.
        known = known_way_to_multiply(asked, path.parent)
        asked = with_way_to_multiply(asked, *known) if known else asked
        facts = _examined(asked, plugins, device, progress)
        asked = with_way_to_multiply(asked, facts.chunk_size, facts.vectorize_up_to)
        StudyFolder.create(path.parent, path.name, dump_spec(asked))
    study = StudyFolder(path)
    # A second process is refused before it touches anything.
    with locked(study.path, "study"):
        spec, remarks = merged(study, asked)
        for remark in remarks:
            progress.say(remark)
        if dump_spec(spec) != study.spec_text:
            study.write_spec_text(dump_spec(spec))
        every, maker = tasks_of(spec, asked.seeds), this_maker(device, plugins)
        tasks = missing_tasks(study, spec, asked.seeds)
        if remark := made_otherwise(study, [t for t in every if t not in tasks], maker):
            progress.say(remark)
        if not tasks:
            progress.say(f"{study.path}: all runs are done")
            return conclude(study, spec)
        facts = facts or _examined(spec, plugins, device, progress)
        check_data(study, facts.fingerprint)
        space = check_disk(study.path, disk_of(spec, tasks, facts))
        study.record_environment()
        create_runs(study, spec, every, facts.fingerprint, maker, tasks)
        left = take_over(study, tasks)
        if shared := len(tasks) - len(left):
            progress.say(f"{shared} runs are taken over from other studies, which have made them")
        tasks = longest_first(spec, left, facts.num_samples)
        if not tasks:
            return conclude(study, spec)
        workers = min(workers or default_workers(spec.threads, device), len(tasks))
        progress.begin(study, spec, tasks, facts, workers, plugins, space)
        try:
            outcome = run_tasks(
                study,
                tasks,
                workers=workers,
                device=device,
                threads=spec.threads,
                plugins=plugins,
                watch=progress.show,
            )
        finally:
            progress.stop()
        progress.end(outcome)
        if outcome.interrupted or load(study).empty:
            return StudyResult(study, [], None, [], outcome)
        progress.say("drawing figures, writing the report ...")
        return conclude(study, spec, outcome)


def _examined(spec: Spec, plugins: Sequence[str], device: str, progress: Progress) -> ProblemFacts:
    progress.say("building the problem ...")
    return examine(spec, plugins, device)
