"""Look at what is there: all runs, one study, one run, several runs side by side; end a phase."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thalweg.errors import InvalidInput, ThalwegError, invalid, unknown_name
from thalweg.lab.differing_settings import differences_of, plain_value, settings_beside
from thalweg.lab.store import RunFolder, StudyFolder, durable, find_studies, open_study
from thalweg.lab.store.folders import unopened_studies

if TYPE_CHECKING:
    import pandas


def run_rows(root: Path | str = "runs") -> list[dict[str, Any]]:
    """All runs of all studies below `root`: name, status, and what differs between the studies.

    `settings` is what a run's study does otherwise than the others of the same phases and branches;
    runs of a study that is alone of its kind have none.
    """
    rows: list[dict[str, Any]] = [
        {"run": name, "state": "not opened", "message": why}
        for name, why in unopened_studies(root).items()
    ]
    studies = find_studies(root)
    for study, settings in zip(studies, settings_beside(studies), strict=True):
        beside = {"settings": settings} if settings else {}
        for run in study.runs():
            try:
                status = run.status()
                state = {"state": "waiting"} if status is None else asdict(status)
            except (ThalwegError, OSError) as error:
                state = {"state": "damaged", "message": str(error)}
            rows.append({"run": f"{study.name}/seed-{run.seed}/{run.branch}", **state, **beside})
        for file in study.missing_run_tables():
            name = f"{study.name}/{file.parent.relative_to(study.path).as_posix()}"
            rows.append({"run": name, "state": "damaged", "message": f"{file}: is missing"})
    return rows


def open_run(name: str, root: Path | str = "runs") -> RunFolder:
    """The run that `STUDY/seed-N/BRANCH` (or its path) names.

    Raises:
        InvalidInput: there is no such run.
    """
    study_name, rest = _parts(name)
    if rest is None:
        raise invalid("run", name, "STUDY/seed-N/BRANCH")
    study = open_study(study_name, root)
    known = {f"seed-{run.seed}/{run.branch}": run for run in study.runs()}
    if rest not in known:
        raise unknown_name(f"run of {study.name}", rest, known)
    return known[rest]


def ask_to_end_phase(name: str, root: Path | str = "runs") -> Path:
    """Ask the run that `STUDY/seed-N/BRANCH` names to end its current phase at the next step.

    By a file in the run's folder that the run looks for at every step. Each request has a name of
    its own, which the run's checkpoint remembers: it is followed once, whatever is killed when.

    Raises:
        InvalidInput: there is no such run, or it is not running.
    """
    run = open_run(name, root)
    status = run.status()
    if status is None or status.state != "running":
        state = "not begun" if status is None else status.state
        raise InvalidInput(f"{name}: it is {state}; only a running run can end its phase")
    durable.write_file(run.phase_request, secrets.token_hex(8) + "\n")
    return run.phase_request


def describe(name: str, root: Path | str = "runs") -> dict[str, Any]:
    """What is known of a study (its runs, its verdicts) or of a run (status, last numbers).

    The `settings` of a study are those by which it differs from others beside it, see `run_rows`.

    Raises:
        InvalidInput: there is no such study or run.
    """
    study_name, rest = _parts(name)
    if rest is None:
        study = open_study(study_name, root)
        runs = {f"seed-{run.seed}/{run.branch}": _state(run) for run in study.runs()}
        verdicts = study.read_verdicts() or []
        judged = {v.get("label", v["claim"]): v["outcome"] for v in verdicts}
        settings = _settings_beside_others(study)
        return {"study": str(study.path), **settings, **runs, **judged}
    run = open_run(name, root)
    status = run.status()
    last = run.read_metrics().to_pylist()[-1:]
    return {
        "run": str(run.path),
        **({"state": "waiting"} if status is None else asdict(status)),
        **({key: value for key, value in last[0].items() if value is not None} if last else {}),
    }


def compare(names: Sequence[str], root: Path | str = "runs") -> pandas.DataFrame:
    """The numbers of several runs at the last step that all of them measured, a column a run.

    Above them the settings that differ between the runs' studies; one that has the name of a number
    stands by its key path.

    Raises:
        InvalidInput: there is no such run, or no step is common to all.
    """
    import pandas

    runs = {name: open_run(name, root) for name in names}
    tables = {name: run.read_metrics().to_pandas() for name, run in runs.items()}
    common = set.intersection(*(set(table["step"]) for table in tables.values()))
    if not common:
        raise InvalidInput("these runs have no measured step in common")
    step = max(common)
    columns = {
        name: table[table["step"] == step].iloc[0].map(_scalar) for name, table in tables.items()
    }
    numbers = pandas.DataFrame(columns).dropna(how="all")
    settings = _settings_that_differ(runs, taken=numbers.index)
    return pandas.concat([settings, numbers]) if len(settings) else numbers


def _settings_that_differ(
    runs: Mapping[str, RunFolder], taken: Collection[str]
) -> pandas.DataFrame:
    """The settings that differ between the studies of runs: a column a run."""
    import pandas

    found = differences_of([StudyFolder(run.path.parent.parent) for run in runs.values()])
    names = {name: path if name in taken else name for name, path in found.paths.items()}
    columns = {
        run: {names[name]: plain_value(value) for name, value in own.items()}
        for run, own in zip(runs, found.settings, strict=True)
    }
    return pandas.DataFrame(columns, index=list(names.values()), dtype=object)


def _settings_beside_others(study: StudyFolder) -> dict[str, Any]:
    """What a study does otherwise than those beside it, where there is such a thing."""
    studies = [one for one in find_studies(study.path.parent) if one.path != study.path]
    settings = settings_beside([study, *studies])[0]
    return {"settings": settings} if settings else {}


def _scalar(value: Any) -> Any:
    return value if isinstance(value, Real) else None


def _state(run: RunFolder) -> str:
    status = run.status()
    if status is None:
        return "waiting"
    message = f": {status.message}" if status.message else ""
    return f"{status.state} at step {status.step}{message}"


def _parts(name: str) -> tuple[str, str | None]:
    """`.../STUDY/seed-N/BRANCH` as study and `seed-N/BRANCH`; the latter None for a study."""
    pieces = name.rstrip("/").split("/")
    if len(pieces) >= 3 and pieces[-2].startswith("seed-"):
        return "/".join(pieces[:-2]), "/".join(pieces[-2:])
    return name.rstrip("/"), None
