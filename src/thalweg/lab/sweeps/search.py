"""Search for good settings: Optuna asks for points, the lab runs them and tells what came of them.

    result = lab.search("digits", {"lr": Range(0.001, 1.0, "log")}, trials=20, minimize="loss")
    result.best.settings

The points are those of one sweep. Optuna draws from a fixed seed, and a batch is told before the
next one is asked: the same search asks for the same points, so that one which was ended is called
again, and has what it had.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thalweg.errors import InvalidInput, invalid, require_extra, unknown_name
from thalweg.lab.config import TRUNK
from thalweg.lab.execution.schedule import Outcome
from thalweg.lab.preparing import read_spec
from thalweg.lab.store import StudyFolder, load
from thalweg.lab.study import roles_of
from thalweg.lab.sweeps.axes import Axes, Range, Settings
from thalweg.lab.sweeps.points import Point, Setting, Sweep
from thalweg.lab.sweeps.running import sweep
from thalweg.lab.sweeps.specs import sweep_specs
from thalweg.registry import load_plugin

if TYPE_CHECKING:
    import optuna

AT_ONCE = 4
"""Points that are asked for before any of them is told."""
STARTS = 10
"""Points that Optuna draws at random before it models what it was told."""


@dataclass(frozen=True)
class Trial:
    """A point that was asked for.

    Attributes:
        point: its settings and study.
        value: what was told of it, the mean over seeds; infinite where a seed has diverged or
            failed.
    """

    point: Point
    value: float


@dataclass(frozen=True)
class SearchResult:
    """What a search gave.

    Attributes:
        sweep: with all points.
        trials: in the order in which they were asked for.
        outcome: of the last batch.
        report: the sweep's page; None after an interruption.
        maximized: whether the greatest value is the best.
    """

    sweep: Sweep
    trials: Sequence[Trial]
    outcome: Outcome
    report: Path | None
    maximized: bool

    @property
    def best(self) -> Trial:
        """The trial with the best value."""
        return (max if self.maximized else min)(self.trials, key=lambda trial: trial.value)

    @property
    def exit_code(self) -> int:
        """0, or 75 after an interruption; a point that diverged is an answer, too."""
        return self.outcome.exit_code if self.outcome.interrupted else 0


def search(
    source: str | Path,
    space: Mapping[str, Range | Sequence[Setting]],
    *,
    trials: int,
    minimize: str | None = None,
    maximize: str | None = None,
    branch: str | None = None,
    at_once: int = AT_ONCE,
    draw_seed: int = 0,
    **options: Any,
) -> SearchResult:
    """Search for the settings at which a measured quantity ends lowest, or highest.

    Args:
        source: a TOML file, or the name of a built-in spec or study.
        space: where values are drawn, a `Range` or a list of values for each key.
        trials: how many points are tried.
        minimize, maximize: one of them: a column of the metrics; default: minimize "loss".
        branch: whose last value counts; default: the plain branch, or the trunk without branches.
        at_once: points that are asked for together.
        draw_seed: of Optuna's sampler.
        options: as for `lab.sweep`.

    Raises:
        MissingExtra: Optuna is not installed.
        InvalidInput: no such column or branch, or what `lab.sweep` refuses.
    """
    require_extra("optuna", "optuna")
    if not space:
        raise InvalidInput("search: no key; say where: --random KEY=log:0.001:1")
    if minimize is not None and maximize is not None:
        raise invalid("search", "minimize and maximize", "one of them")
    if trials < 1 or at_once < 1:
        raise invalid("search", f"{trials} trials, {at_once} at once", "integers >= 1")
    column = maximize or minimize or "loss"
    asked = _optuna_study(maximize is not None, draw_seed)
    told: list[Trial] = []
    while True:
        batch = [_ask(asked, space) for _ in range(min(at_once, trials - len(told)))]
        settings = [_settings(space, trial.params) for trial in batch]
        if branch is not None:
            _check_branch(branch, source, settings, options)
        result = sweep(source, points=settings, **options)
        for trouble in result.left_out.values():
            raise trouble  # nothing can be told of its point
        if result.outcome.interrupted or result.outcome.submitted:
            break
        for trial, own in zip(batch, settings, strict=True):
            point = next(p for p in result.sweep.points if dict(p.settings) == own)
            value = _value(point.study, column, branch, worst=-1 if maximize else 1)
            asked.tell(trial, value)
            told.append(Trial(point, value))
        if len(told) >= trials:
            break
    return SearchResult(result.sweep, told, result.outcome, result.report, maximize is not None)


def _check_branch(
    branch: str,
    source: str | Path,
    settings: Sequence[Settings],
    options: Mapping[str, Any],
) -> None:
    """Refuse a branch that the points do not have, before any of them is planned.

    Raises:
        InvalidInput: there is no such branch.
    """
    for plugin in options.get("plugins", ()):
        load_plugin(plugin)
    axes = Axes(list=settings)
    given = {key: options[key] for key in ("problem", "overrides") if key in options}
    for _, spec in sweep_specs(source, axes, **given).points:
        if branch not in (names := [TRUNK, *spec.branches]):
            raise unknown_name("branch", branch, names)


def _optuna_study(maximized: bool, seed: int) -> optuna.Study:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTS)
    direction = "maximize" if maximized else "minimize"
    return optuna.create_study(direction=direction, sampler=sampler)


def _ask(study: optuna.Study, space: Mapping[str, Range | Sequence[Setting]]) -> optuna.trial.Trial:
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    fixed: dict[str, Any] = {}
    for key, where in space.items():
        if not isinstance(where, Range):
            # By number: Optuna's own choices are plain values, and no lists.
            fixed[key] = CategoricalDistribution(range(len(where)))
        elif isinstance(where.low, int) and isinstance(where.high, int):
            fixed[key] = IntDistribution(where.low, where.high, log=where.scale == "log")
        else:
            fixed[key] = FloatDistribution(where.low, where.high, log=where.scale == "log")
    return study.ask(fixed)


def _settings(space: Mapping[str, Range | Sequence[Setting]], drawn: Mapping[str, Any]) -> Settings:
    settings: Settings = {}
    for key, where in space.items():
        settings[key] = where.rounded(drawn[key]) if isinstance(where, Range) else where[drawn[key]]
    return settings


def _value(study: StudyFolder, column: str, branch: str | None, worst: int) -> float:
    """The mean over seeds of the last value of a column; infinite where a run did not end well."""
    spec = read_spec(study)
    branch = branch or roles_of(spec).get("plain", [TRUNK, *spec.branches][-1])
    runs = [study.run(seed, branch) for seed in spec.seeds]
    statuses = [run.status() for run in runs]
    if not all(status is not None and status.state == "done" for status in statuses):
        return worst * math.inf
    rows = load(study)
    rows = rows[rows["branch"] == branch]
    measured = [name for name in rows.columns if rows[name].dtype.kind == "f"]
    if column not in measured:
        raise unknown_name("column", column, measured)
    last = rows.groupby("seed")[column].last().to_numpy(dtype="float64")
    mean = float(last.mean())
    return mean if math.isfinite(mean) else worst * math.inf
