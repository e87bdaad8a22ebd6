"""What has a sweep measured so far? A row for each run, and one for each verdict of each point.

Example:
    >>> import tempfile
    >>> from pathlib import Path
    >>> from thalweg.lab.store import StudyFolder
    >>> from thalweg.lab.sweeps.points import Point, Sweep
    >>> with tempfile.TemporaryDirectory() as root:
    ...     points = [Point({"lr": lr}, StudyFolder(Path(root, f"lr-{lr}"))) for lr in (0.1, 0.2)]
    ...     table = read_table(Sweep(Path(root), "rates", (0, 1), tuple(points)))
    >>> table.runs[["lr", "seed", "state"]].values.tolist()
    [[0.1, 0, 'waiting'], [0.1, 1, 'waiting'], [0.2, 0, 'waiting'], [0.2, 1, 'waiting']]
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from thalweg.analysis.claims.judgement import DEFAULT_ROLES
from thalweg.analysis.claims.verdicts import SYMBOLS
from thalweg.analysis.figures.branch_style import in_order
from thalweg.analysis.quantities import quantities
from thalweg.errors import ThalwegError
from thalweg.lab.store.folders import TRUNK, RunFolder
from thalweg.lab.store.metrics import count_rows, last_values
from thalweg.lab.sweeps.points import Point, Setting, Sweep

if TYPE_CHECKING:
    import pandas as pd

STATISTICS = tuple(
    name for name, quantity in quantities.items() if not (quantity.groups or quantity.entries)
)
"""The catalogued quantities that are one number a step."""

DAMAGED = "damaged"
"""State of a run whose files are not what was written; its numbers are left out."""

_OF_RUN = ("point", "study", "seed", "branch", "state", "steps", "note")
_OF_VERDICT = ("label", "claim", "outcome", "mean", "low", "high", "seeds", "note")


@dataclass(frozen=True)
class SweepTable:
    """A sweep's measurements.

    Attributes:
        sweep: whose they are.
        runs: a row for each point, seed and branch: `point` (its place in the sweep), the settings,
            `study`, `seed`, `branch`, `state`, `steps` made, `note`, and the last measured value of
            each of `STATISTICS` that any run has; NaN where a run does not have it. `state` is that
            of `status.json` ("done", "diverged", "failed", "running", "interrupted", "waiting") or
            "damaged"; `note` says why a run failed, or what is damaged.
        verdicts: a row for each point and claim label that it was judged on: `point`, the settings,
            `study`, `label`, `claim`, `outcome`, `mean`, `low`, `high`, `seeds`, how many were
            measured, and `note`, such as why it is undecided. None where a run diverged and nothing
            was left to judge.
        columns: of both, the column of each setting: its key, or `set.` and its key where a column
            has that name already.
    """

    sweep: Sweep
    runs: pd.DataFrame
    verdicts: pd.DataFrame
    columns: Mapping[str, str]

    def settings(self, point: int) -> dict[str, int | float | str | bool]:
        """What a point sets, by column; the point is its place in the sweep."""
        given = self.sweep.points[point].settings
        return {self.columns[key]: _cell(value) for key, value in given.items()}

    @cached_property
    def statistics(self) -> list[str]:
        """The quantities that some run has measured."""
        return [name for name in STATISTICS if name in self.runs.columns]

    @cached_property
    def branches(self) -> list[str]:
        """The branches that some point has: the trunk, the standard ones, then by name."""
        return in_order((name for name in self.runs["branch"] if name), DEFAULT_ROLES)

    @cached_property
    def diverged(self) -> set[int]:
        """The points at which a run diverged."""
        return set(self.runs.loc[self.runs["state"] == "diverged", "point"])

    @cached_property
    def labels(self) -> list[str]:
        """The claims that some point was judged on, as they first occur."""
        return list(dict.fromkeys(self.verdicts["label"]))


def read_table(sweep: Sweep) -> SweepTable:
    """Read where all runs of a sweep stand, at any time, whatever state its folders are in.

    A point that has not begun has a row for each seed and each branch that other points have, in
    the state "waiting" (one row a seed, without a branch, where no point has begun). Of damaged
    files it is said in the row; nothing is raised.
    """
    import pandas as pd

    found = [point.study.runs() for point in sweep.points]
    everywhere = list(dict.fromkeys(run.branch for runs in found for run in runs)) or [""]
    columns = _columns(sweep)
    runs: list[dict[str, Any]] = []
    verdicts: list[dict[str, Any]] = []
    for number, (point, folders) in enumerate(zip(sweep.points, found, strict=True)):
        settings = {columns[key]: _cell(value) for key, value in point.settings.items()}
        start = {"point": number, **settings, "study": point.study.name}
        there = {(run.seed, run.branch): run for run in folders}
        branches = list(dict.fromkeys(run.branch for run in folders)) or everywhere
        places = dict.fromkeys([*there, *((s, name) for s in sweep.seeds for name in branches)])
        rows = {place: _run(there.get(place)) for place in places}
        for seed, branch in sorted(places, key=lambda place: (place[0], branches.index(place[1]))):
            own = _after_trunk(rows[seed, branch], rows.get((seed, TRUNK)))
            runs.append({**start, "seed": seed, "branch": branch, **own})
        diverged = any(row["state"] == "diverged" for row in runs if row["point"] == number)
        judged = (one for one in _verdicts(point) if not (diverged and _says_nothing(one)))
        verdicts += [{**start, **verdict} for verdict in judged]
    keys = list(columns.values())
    measured = {name for row in runs for name in row} - {*_OF_RUN, *keys}
    order = ["point", *keys, *_OF_RUN[1:], *(name for name in STATISTICS if name in measured)]
    return SweepTable(
        sweep,
        pd.DataFrame(runs, columns=order),
        pd.DataFrame(verdicts, columns=["point", *keys, "study", *_OF_VERDICT]),
        columns,
    )


def _columns(sweep: Sweep) -> dict[str, str]:
    taken = {*_OF_RUN, *_OF_VERDICT, *STATISTICS}
    return {key: f"set.{key}" if key in taken else key for key in sweep.keys}


def _cell(value: Setting) -> int | float | str | bool:
    """A setting as one cell of a table: lists and tables as JSON."""
    return json.dumps(value) if isinstance(value, list | dict) else value


def _run(run: RunFolder | None) -> dict[str, Any]:
    """State, steps, note and last values of one run."""
    if run is None:
        return {"state": "waiting", "steps": 0, "note": ""}
    state, steps, said = "waiting", 0, ""
    try:
        status = run.status()
        if status is not None:
            state, steps, said = status.state, status.step, status.message
        values = last_values(run.metrics, STATISTICS, status.run_hash if status else "")
        if status is not None and status.state == "done" and status.rows is not None:
            rows = count_rows(run.metrics)
            # More rows: it is being extended.
            if rows < status.rows:
                damage = f"{rows} of {status.rows} measured rows are there"
                return {"state": DAMAGED, "steps": steps, "note": damage}
    except (ThalwegError, OSError, ValueError) as error:
        return {"state": DAMAGED, "steps": steps, "note": _line(str(error))}
    return {"state": state, "steps": steps, "note": _line(said), **values}


def _after_trunk(run: dict[str, Any], trunk: dict[str, Any] | None) -> dict[str, Any]:
    """A branch never begins whose trunk has diverged: the seed diverged for it too."""
    if trunk is not None and trunk["state"] == "diverged" and run["state"] == "waiting":
        return {**run, "state": "diverged", "note": "the trunk diverged before the branch point"}
    return run


def _verdicts(point: Point) -> Iterable[dict[str, Any]]:
    for verdict in point.study.known_verdicts():
        if verdict["outcome"] in SYMBOLS:
            values = verdict.get("values")
            values = list(values.values()) if isinstance(values, dict) else []
            yield {
                "label": verdict.get("label") or verdict["claim"],
                "claim": verdict["claim"],
                "outcome": verdict["outcome"],
                **{name: _number(verdict.get(name)) for name in ("mean", "low", "high")},
                "seeds": sum(not math.isnan(_number(value)) for value in values),
                "note": _note(verdict.get("note")),
            }


def _says_nothing(verdict: Mapping[str, Any]) -> bool:
    """Whether nothing was measured that a claim could be judged by."""
    return verdict["outcome"] == "undecided" and math.isnan(verdict["mean"])


def _note(said: object) -> str:
    """What is said beside a verdict; of what is said of each seed, the first."""
    first = said.split(";")[0] if isinstance(said, str) else ""
    return _line(re.sub(r"^seed \d+: ", "", first))


def _number(value: object) -> float:
    """A number as JSON has it ("inf" is text); NaN for whatever is none."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _line(text: str) -> str:
    return " ".join(text.split())[:300]
