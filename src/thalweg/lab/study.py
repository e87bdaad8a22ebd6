"""A study from its spec to its verdicts: prepare the folder, run what is missing, judge, draw.

The folder's name holds a hash of everything that determines the numbers. So the same settings land
in the same folder: a second call resumes or extends what is there, and nothing is overwritten.

Example (about two minutes on two cores):

    >>> from thalweg.lab.study import reproduce       # doctest: +SKIP
    >>> result = reproduce(problem="digits")          # doctest: +SKIP
    >>> result.data.groupby("branch").loss.last()     # doctest: +SKIP
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thalweg.errors import InvalidInput, unknown_name
from thalweg.lab.claims.judgement import Verdict, judge_all
from thalweg.lab.claims.published import CLAIMS
from thalweg.lab.claims.verdicts import verdicts_to_json
from thalweg.lab.estimate import Estimate, estimate
from thalweg.lab.progress import Progress
from thalweg.lab.registry import load_plugin
from thalweg.lab.run_names import TRUNK
from thalweg.lab.schedule import Outcome, Task, run_tasks, tasks_of, usable_cores
from thalweg.lab.spec import PROBLEM_SPECS, Spec, check_names, dump_spec, load_spec, parse_spec
from thalweg.lab.spec import spec_hash as hash_of
from thalweg.lab.store import StudyFolder, load, open_study

if TYPE_CHECKING:
    import pandas

STUDIES = ("main",)


@dataclass(frozen=True)
class StudyResult:
    """What a study gave.

    Attributes:
        study: its folder.
        verdicts: one for each claim.
        report: the HTML page.
        figures: the PNG files.
        outcome: exit statuses of the runs of this call.
    """

    study: StudyFolder
    verdicts: list[Verdict]
    report: Path
    figures: list[Path]
    outcome: Outcome

    @property
    def data(self) -> pandas.DataFrame:
        """All metrics, one row a measured step."""
        return load(self.study)

    @property
    def exit_code(self) -> int:
        """0: done; 75: interrupted; else the first failure's."""
        codes = [code for code in self.outcome.exit_codes.values() if code]
        if self.outcome.interrupted:
            return 75
        return codes[0] if codes else 0


def reproduce(
    study: str = "main",
    problem: str = "digits",
    *,
    data_dir: str | None = None,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    **options: Any,
) -> StudyResult:
    """Reproduce a study of the paper on a problem; see `run_study` for the other options.

    Raises:
        InvalidInput: an unknown study or problem, or a bad value.
    """
    return run_study(
        reproduction_spec(study, problem, data_dir=data_dir, overrides=overrides), **options
    )


def reproduction_spec(
    study: str,
    problem: str,
    *,
    data_dir: str | None = None,
    overrides: Mapping[str, Any] | Sequence[str] = (),
) -> Spec:
    """The spec that `reproduce` runs.

    Raises:
        InvalidInput: an unknown study or problem, or a bad value.
    """
    if study not in STUDIES:
        raise unknown_name("study", study, STUDIES)
    if problem not in PROBLEM_SPECS:
        raise unknown_name("problem", problem, PROBLEM_SPECS)
    if data_dir is not None:
        place = {"problem.data.data_dir": data_dir}
        if isinstance(overrides, Mapping):
            overrides = {**place, **overrides}
        else:
            overrides = ["--problem.data.data_dir", data_dir, *overrides]
    return load_spec(PROBLEM_SPECS[problem], overrides)


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
        InvalidInput: an unknown probe or claim, data that cannot be read, k > P.
    """
    progress = progress or Progress.silent()
    for plugin in plugins:
        load_plugin(plugin)
    check_spec(spec)
    study, spec, expected = _prepare(spec, Path(root), plugins, progress)
    device = resolve_device(spec.device)
    tasks = _missing(study, spec)
    workers = workers or _default_workers(spec, device)
    for task in tasks_of(spec):
        run = study.run(task.seed, task.branch)
        run.create(_run_text(spec, task))
    progress.begin(study, spec, tasks, expected, workers)
    outcome = run_tasks(
        study,
        tasks,
        workers=workers,
        device=device,
        threads=spec.threads,
        plugins=plugins,
        watch=progress.show,
    )
    progress.end(outcome)
    return conclude(study, spec, outcome)


def resume(study: str | Path, *, root: Path | str = "runs", **options: Any) -> StudyResult:
    """Go on with a study that was interrupted, or judge anew one that is done."""
    folder = open_study(study, root)
    spec = parse_spec(tomllib.loads(folder.spec_text), source=str(folder.path / "spec.toml"))
    return run_study(spec, root=folder.path.parent, **options)


def conclude(study: StudyFolder, spec: Spec, outcome: Outcome | None = None) -> StudyResult:
    """Judge the claims on what has been measured, draw the figures, write the report."""
    from thalweg.lab.figures.catalogue import save_figures
    from thalweg.lab.report import write_report

    data = load(study)
    roles = roles_of(spec)
    verdicts = judge_all([CLAIMS[name] for name in spec.claims], data, roles)
    study.write_verdicts(json.loads(verdicts_to_json(verdicts)))
    figures = save_figures(data, study.path / "figures", roles)
    problem = spec.problem.data.registered_name
    report = write_report(
        study.path,
        data,
        verdicts,
        study.spec_text,
        study.environments()[-1],
        figures,
        title=f"{spec.name} on {problem}",
        roles=roles,
        command=f"thalweg run {study.path / 'spec.toml'}",
    )
    paths = [saved.png for saved in figures.saved]
    return StudyResult(study, verdicts, report, paths, outcome or Outcome())


def check_spec(spec: Spec) -> None:
    """Check the names that a spec uses for probes and claims."""
    from thalweg.dynamics import PROBES

    check_names(spec, probes=PROBES, claims=CLAIMS)


def roles_of(spec: Spec) -> dict[str, str]:
    """Which branch is the plain one, the dominant one and the bulk one, by what they do."""
    wanted = {(1.0, 1.0): "plain", (1.0, 0.0): "dominant", (0.0, 1.0): "bulk"}
    roles: dict[str, str] = {}
    for name in spec.branches:
        split = spec.branch_phase(name).split
        parts = (1.0, 1.0) if split is None else (split.dominant, split.bulk)
        if split is not None and split.basis != "live":
            continue
        if parts in wanted:
            roles.setdefault(wanted[parts], name)
    return roles


def resolve_device(device: str) -> str:
    """What "auto" means here; a device that is asked for must exist.

    Raises:
        InvalidInput: there is no such device.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    missing = (device.startswith("cuda") and not torch.cuda.is_available()) or (
        device == "mps" and not torch.backends.mps.is_available()
    )
    if missing:
        raise InvalidInput(f"device: got {device!r}, but this machine has none; allowed: 'cpu'")
    return device


def _prepare(
    spec: Spec, root: Path, plugins: Sequence[str], progress: Progress
) -> tuple[StudyFolder, Spec, Estimate | None]:
    """Find or make the folder; what was chosen by measuring stays as it is written there."""
    name = f"{spec.name}-{spec.problem.data.registered_name}-{hash_of(spec)}"
    path = root / name
    if (path / "spec.toml").is_file():
        study = StudyFolder(path)
        known = parse_spec(tomllib.loads(study.spec_text), source=str(path / "spec.toml"))
        spec = _with_measured(spec, known.problem.product_method)
        if spec.seeds != known.seeds:
            seeds = tuple(sorted({*known.seeds, *spec.seeds}))
            spec = spec.model_copy(update={"seeds": seeds})
        if spec != known:
            study.write_spec_text(dump_spec(spec))
        if not _missing(study, spec):
            return study, spec, None
        study.record_environment()
        return study, spec, estimate(spec, plugins, resolve_device(spec.device))
    progress.say("measuring a few steps ...")
    expected = estimate(spec, plugins, resolve_device(spec.device))
    spec = _with_measured(spec, expected.method)
    study = StudyFolder.create(root, name, dump_spec(spec))
    return study, spec, expected


def _with_measured(spec: Spec, method: str) -> Spec:
    if spec.problem.product_method != "auto":
        return spec
    problem = spec.problem.model_copy(update={"product_method": method})
    return spec.model_copy(update={"problem": problem})


def _missing(study: StudyFolder, spec: Spec) -> list[Task]:
    """The runs that are not done, or whose bound was raised since."""
    missing = []
    for task in tasks_of(spec):
        run = study.run(task.seed, task.branch)
        status = run.status() if run.path.is_dir() else None
        if status is None or status.state != "done":
            missing.append(task)
        elif task.branch != TRUNK and _is_extended(run.run_text, _run_text(spec, task)):
            run.write_run_text(_run_text(spec, task))
            missing.append(task)
    return missing


def _is_extended(before: str, now: str) -> bool:
    return tomllib.loads(before).get("steps") != tomllib.loads(now).get("steps")


def _run_text(spec: Spec, task: Task) -> str:
    import tomli_w

    phases = spec.phases if task.branch == TRUNK else (spec.branch_phase(task.branch),)
    content = {
        "seed": task.seed,
        "branch": task.branch,
        "steps": [phase.steps or f"{phase.epochs} epochs" for phase in phases],
        "phases": [phase.model_dump(mode="json", exclude_none=True) for phase in phases],
    }
    return tomli_w.dumps(content)


def _default_workers(spec: Spec, device: str) -> int:
    return max(1, usable_cores() // spec.threads) if device == "cpu" else 1
