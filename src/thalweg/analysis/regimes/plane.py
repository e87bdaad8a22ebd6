"""Which settings span a picture, and what is each point's value there?

Example:
    >>> Axis("lr", (0.001, 0.01, 0.1)).labels, Axis("batch_size", (10, "all")).numerical
    (('0.001', '0.01', '0.1'), False)
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING, Any

from thalweg.analysis.claims.statistics import rows_where
from thalweg.analysis.figures.dots import Dots
from thalweg.analysis.quantities import quantities
from thalweg.analysis.regimes.table import SweepTable
from thalweg.errors import invalid, unknown_name
from thalweg.lab.differing_settings import short_text
from thalweg.lab.sweeps.points import Point, Setting, Sweep

if TYPE_CHECKING:
    import pandas as pd

FEWEST_FOR_INTERVAL = 3
"""With two seeds the t-interval is 13 times as wide as they are apart: their range is shown."""
MOST_PANELS = 48
"""Small multiples of one figure."""


def is_number(value: object) -> bool:
    """Whether a setting is a finite number (true and false are none)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def setting_text(value: Setting | None) -> str:
    """A setting's value as a label: 1 and 1.0 are one; an en dash where it is not set."""
    if value is None:
        return "\N{EN DASH}"
    if isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e6:
        return str(int(value))
    if isinstance(value, Mapping):
        return short_text(value)
    return repr(value) if is_number(value) else json.dumps(value)


def plain_text(text: str) -> str:
    """Text for a figure in which a dollar sign begins no formula."""
    return text.replace("$", r"\$")


@dataclass(frozen=True)
class Axis:
    """A setting that differs between points.

    Attributes:
        key: as the user wrote it.
        values: each once, numbers by size, then others as they occur; None where it is not set.
    """

    key: str
    values: tuple[Setting | None, ...]

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """Each value's own text."""
        return tuple(map(setting_text, self.values))

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """What stands beside each value: three digits of a number where that tells all apart."""
        short = tuple(
            f"{value:.3g}" if isinstance(value, float) and is_number(value) else text
            for value, text in zip(self.values, self.texts, strict=True)
        )
        return tuple(_shortened(text) for text in (short if _all_differ(short) else self.texts))

    @property
    def numerical(self) -> bool:
        """Whether all values are numbers."""
        return all(is_number(value) for value in self.values)

    @cached_property
    def logarithmic(self) -> bool:
        """Whether its numbers are positive and span a factor of eight: powers of two do."""
        if not self.numerical:
            return False
        numbers = [float(value) for value in self.values]  # type: ignore[arg-type]
        return min(numbers) > 0 and max(numbers) / min(numbers) >= 8

    @cached_property
    def _rank(self) -> Mapping[str, int]:
        return {text: rank for rank, text in enumerate(self.texts)}

    def rank(self, point: Point) -> int:
        """The place of a point's value among the values."""
        return self._rank[setting_text(point.settings.get(self.key))]

    def number(self, point: Point) -> float:
        """A point's value, its rank where not all values are numbers."""
        return float(point.settings[self.key]) if self.numerical else self.rank(point)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Panel:
    """One of the small multiples.

    Attributes:
        title: the settings that all its points have; empty where there is one panel.
        points: their places in the sweep.
    """

    title: str
    points: tuple[int, ...]


@dataclass(frozen=True)
class Plane:
    """How the points of a sweep are laid out.

    Attributes:
        horizontal, vertical: the axes; none where no setting differs, or one alone.
        others: the settings that differ besides; each combination of them is a panel.
    """

    sweep: Sweep
    horizontal: Axis | None = None
    vertical: Axis | None = None
    others: tuple[Axis, ...] = field(default=())

    @cached_property
    def panels(self) -> tuple[Panel, ...]:
        """A panel for each combination of the other settings that some point has."""
        return panels_of(self.sweep, self.others)

    @cached_property
    def is_grid(self) -> bool:
        """Whether more than half of all cells have a point, and none has two: else a scatter."""
        if self.horizontal is None or self.vertical is None:
            return True
        cells = [self.cell(number) for panel in self.panels for number in panel.points]
        per_panel = [
            (self.cell(number), at)
            for at, panel in enumerate(self.panels)
            for number in panel.points
        ]
        room = len(self.horizontal.values) * len(self.vertical.values)
        return 2 * len(set(cells)) > room and len(set(per_panel)) == len(per_panel)

    def cell(self, number: int) -> tuple[int, int]:
        """Column and row of a point; the row is 0 without a second axis."""
        point = self.sweep.points[number]
        column = self.horizontal.rank(point) if self.horizontal else 0
        return column, self.vertical.rank(point) if self.vertical else 0


def panels_in_a_row(panels: int, others: Sequence[Axis], most: int) -> int:
    """How many small multiples stand side by side: of two settings, one is the columns."""
    if len(others) > 1 and len(others[-1].values) <= most:
        return len(others[-1].values)
    if panels <= most:
        return panels
    return next((count for count in (most, most - 1) if panels % count == 0), most)


def varying(sweep: Sweep) -> list[Axis]:
    """The settings that differ between points, those with the most values first."""
    axes = [_axis(sweep, key) for key in sweep.keys]
    return sorted(
        (axis for axis in axes if len(axis.values) > 1), key=lambda axis: -len(axis.values)
    )


def plane_of(sweep: Sweep, names: Sequence[str] | None = None) -> Plane:
    """Lay out the points.

    Args:
        names: the keys of the horizontal and of the vertical axis, or of the horizontal alone;
            None: the two settings with the most values.

    Raises:
        InvalidInput: a key that no point sets (the nearest one is named), one twice, one that is
            the same everywhere, or more than two.
    """
    axes = varying(sweep)
    if names is None:
        first, second, *_ = [*axes, None, None]
        return Plane(sweep, first, second, tuple(axes[2:]))
    if isinstance(names, str) or not 1 <= len(set(names)) == len(names) <= 2:
        raise invalid("axes", names, "a list of one setting or of two different ones")
    known = {axis.key: axis for axis in axes}
    for name in names:
        if name not in sweep.keys:
            raise unknown_name("axis", name, sweep.keys)
        if name not in known:
            allowed = "a setting that differs between points: " + ", ".join(known)
            raise invalid("axis", name, allowed)
    chosen = [known.pop(name) for name in names]
    return Plane(sweep, chosen[0], chosen[1] if len(chosen) > 1 else None, tuple(known.values()))


def panels_of(sweep: Sweep, axes: Sequence[Axis]) -> tuple[Panel, ...]:
    """A panel for each combination of the values of these axes that some point has."""
    members: dict[tuple[int, ...], list[int]] = {}
    for number, point in enumerate(sweep.points):
        members.setdefault(tuple(axis.rank(point) for axis in axes), []).append(number)
    shown = product(*(range(len(axis.values)) for axis in axes))
    return tuple(
        Panel(
            ", ".join(
                f"{axis.key} = {axis.labels[at]}" for axis, at in zip(axes, place, strict=True)
            ),
            tuple(members[place]),
        )
        for place in shown
        if place in members
    )


def statistic_of_points(table: SweepTable, statistic: str, branch: str) -> pd.DataFrame:
    """A statistic at each point, over the seeds whose run of this branch is done.

    Returns:
        A row a point, in the sweep's order: `point`, the settings, `study`, `branch`, `quantity`,
        `mean` (geometric for a quantity on a logarithmic axis), `low` and `high` (the 95 %
        t-interval, from three seeds on; else the lowest and the highest seed), `seeds`, `diverged`
        and `unfinished`, both counts of seeds. Shown as in the catalogue: times its factor.
    """
    import pandas as pd

    quantity = quantities[statistic]
    runs = rows_where(table.runs, "branch", branch)
    by_point: dict[Any, Any] = dict(iter(runs.groupby("point")))
    rows = []
    for number, point in enumerate(table.sweep.points):
        own = by_point.get(number)
        states = [] if own is None else list(own["state"])
        values = [math.nan] * len(states)
        if own is not None and statistic in own:
            values = [value * quantity.factor for value in own[statistic]]
        done = {
            at: value
            for at, (state, value) in enumerate(zip(states, values, strict=True))
            if state == "done" and math.isfinite(value)
        }
        mean, low, high = _over_seeds(done, quantity.logarithmic)
        rows.append(
            {
                "point": number,
                **table.settings(number),
                "study": point.study.name,
                "branch": branch,
                "quantity": statistic,
                "mean": mean,
                "low": low,
                "high": high,
                "seeds": len(done),
                "diverged": sum(
                    state == "diverged" or (state == "done" and math.isinf(value))
                    for state, value in zip(states, values, strict=True)
                ),
                "unfinished": sum(state not in ("done", "diverged") for state in states),
            }
        )
    counted = ["mean", "low", "high", "seeds", "diverged", "unfinished"]
    order = ["point", *table.columns.values(), "study", "branch", "quantity", *counted]
    return pd.DataFrame(rows, columns=order)


def _over_seeds(values: Mapping[int, float], logarithmic: bool) -> tuple[float, float, float]:
    dots = Dots("", values, logarithmic=logarithmic and all(v > 0 for v in values.values()))
    interval = dots.interval()
    if interval is None:
        return math.nan, math.nan, math.nan
    if len(values) < FEWEST_FOR_INTERVAL:
        return interval.mean, min(values.values()), max(values.values())
    return interval.mean, interval.low, interval.high


def _axis(sweep: Sweep, key: str) -> Axis:
    values: dict[str, Setting | None] = {}
    for point in sweep.points:
        value = point.settings.get(key)
        values.setdefault(setting_text(value), value)
    numbers = sorted((v for v in values.values() if is_number(v)), key=float)  # type: ignore[arg-type]
    others = [value for value in values.values() if not is_number(value)]
    return Axis(key, (*numbers, *others))


def _all_differ(texts: Sequence[str]) -> bool:
    return len(set(texts)) == len(texts)


def _shortened(text: str, longest: int = 24) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"
