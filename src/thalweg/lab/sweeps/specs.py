"""Which specs are the points of a sweep? One base, from a file or a name, for each changed.

A spec's own table `[sweep]` says axes, too; `thalweg sweep` alone reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thalweg.errors import InvalidInput, invalid
from thalweg.lab.config import Spec, builtin_studies, load_study, parse_spec, spec_hash
from thalweg.lab.config.loading import SWEEP, spec_tables
from thalweg.lab.config.overrides import full_path, parse_overrides
from thalweg.lab.sweeps.axes import Axes, Settings, axes_from_table, joined

OF_ALL = ("device", "threads", "processes", "seeds", "checkpoint")
"""Keys that all points of a sweep share."""


@dataclass(frozen=True)
class SweepSpecs:
    """The base of a sweep, and the spec of each point with its settings.

    Attributes:
        base: without the settings of a point.
        points: settings and spec, one for each point.
    """

    base: Spec
    points: Sequence[tuple[Settings, Spec]]

    @property
    def keys(self) -> list[str]:
        """The keys that a point can set."""
        return list(dict.fromkeys(key for settings, _ in self.points for key in settings))


def sweep_specs(
    source: str | Path | Spec,
    axes: Axes,
    *,
    problem: str | None = None,
    overrides: Mapping[str, Any] | Sequence[str] = (),
) -> SweepSpecs:
    """The specs of a sweep.

    Args:
        source: a TOML file, or the name of a built-in spec or study.
        axes: what is tried, in addition to the source's own `[sweep]`.
        problem: of a study.
        overrides: values by key path, or words of the command line, for all points.

    Raises:
        InvalidInput: a line for each mistake; no axis; two points that are the same.
    """
    build, own = _builder(source, problem)
    axes = joined(own, axes)
    settings = axes.settings()
    if settings == [{}]:
        raise InvalidInput("sweep: no axis; give one: --grid optimizer.lr=0.01,0.1")
    given = overrides if isinstance(overrides, Mapping) else parse_overrides(overrides)
    _check_keys(list(dict.fromkeys(key for point in settings for key in point)), given)
    base = build(given)
    points = [(point, _built(build, given, point)) for point in settings]
    _refuse_twins(points)
    return SweepSpecs(base, points)


def _check_keys(keys: Sequence[str], given: Mapping[str, Any]) -> None:
    """Refuse keys that all points share, and a key that is given twice, however it is written."""
    for_all = {_plain(key) for key in given}
    written: dict[str, str] = {}
    for key in keys:
        first = key.partition(".")[0].replace("-", "_")
        if first in OF_ALL or first == "seed":
            raise invalid("sweep", key, "a key that may differ between points", _hint(first))
        if _plain(key) in for_all:
            raise invalid(f"--{key}", "a value", "no value beside its axis")
        if (other := written.setdefault(_plain(key), key)) != key:
            raise invalid("sweep", f"{other} and {key}", "one of them: they are the same key")


def _plain(key: str) -> str:
    """One way to write a key: `lr` and `optimizer.lr` are the same, so are `-` and `_`."""
    return full_path(key, Spec).replace("-", "_")


def _hint(key: str) -> str:
    return "give --seeds 0..4" if key in ("seed", "seeds") else f"{key} is one for the whole sweep"


def _builder(
    source: str | Path | Spec, problem: str | None
) -> tuple[Callable[[Mapping[str, Any]], Spec], Axes]:
    """What gives the spec with these overrides; and the axes that the source has itself."""
    if isinstance(source, str) and source in builtin_studies():
        return lambda overrides: load_study(source, problem, overrides), Axes()
    if problem is not None:
        raise invalid("--problem", problem, "none, but with the name of a study")
    if isinstance(source, Spec):
        raise invalid("sweep", "a spec", "a file or a name, whose settings can be changed")
    tables, named = spec_tables(source)
    own = tables.pop(SWEEP, None)
    axes = Axes() if own is None else axes_from_table(own, named)
    return lambda overrides: parse_spec(tables, source=named, overrides=overrides), axes


def _built(
    build: Callable[[Mapping[str, Any]], Spec], given: Mapping[str, Any], point: Settings
) -> Spec:
    try:
        return build({**given, **point})
    except InvalidInput as error:
        at = ", ".join(f"{key} = {value}" for key, value in point.items())
        lines = [f"at {at}: {line}" for line in str(error).splitlines()]
        raise InvalidInput("\n".join(lines)) from None


def _refuse_twins(points: Sequence[tuple[Settings, Spec]]) -> None:
    """Refuse settings that make no difference: their studies would be one.

    Raises:
        InvalidInput: two points have one spec.
    """
    seen: dict[str, Settings] = {}
    for settings, spec in points:
        twin = seen.setdefault(spec_hash(spec), settings)
        if twin is not settings:
            differing = [key for key in settings if settings.get(key) != twin.get(key)]
            raise invalid(
                f"sweep: {', '.join(differing)}",
                f"{twin} and {settings}",
                "settings that change what is run",
                "these two are the same study",
            )
