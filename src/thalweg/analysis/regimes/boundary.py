"""What do a claim's verdicts say of the whole plane? Counts, and the boundary, if there is one.

The rule. A point is *decided* where the verdict is "holds" or "does not hold"; all others count as
neither. A boundary along a numerical setting is stated where it separates the decided points
without exception, in the first of these two forms that they have:

1. one value for the whole plane: every point up to it holds and none above (or the other way
   round), whatever the other settings are;
2. one for each combination of the other settings, always with the same side holding, and lying
   inside the range for more than half of the combinations: two of three, three of five.

The same is asked of the learning rate over the critical one, where a point's critical learning rate
is measured: whether one value of that ratio separates all points. The critical learning rate is the
last measured one, of the branch that is looked at or else of the trunk: `critical_lr_dominant` or
`critical_lr_bulk`, 2 / `critical_sharpness`, or 2 / `sharpness`, the first that separates.

A few points fall into such an order by chance. With H of D decided points holding, C(D, H) ways to
distribute the outcomes are equally likely if no setting matters; the boundary is only stated where
at most one in 20 of them would have given a boundary of that form along any numerical setting.
(Tried: of 3,000 random planes of 6 x 5 points 5 had one, of 3 x 3 points 39.)

Its limits. It describes the points that were run, not what lies between or outside of them. One
point on the wrong side undoes a boundary. It does not find a claim that holds between two values,
nor a boundary along a combination of settings other than that ratio. Training itself moves the
critical learning rate: at the edge of stability the sharpness comes to 2 / lr, the ratio to 1.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from math import comb
from typing import TYPE_CHECKING, Literal

from thalweg.analysis.claims.statistics import rows_where
from thalweg.analysis.claims.verdicts import SYMBOLS, number
from thalweg.analysis.regimes.plane import Axis, setting_text, varying
from thalweg.analysis.regimes.table import SweepTable
from thalweg.lab.store.folders import TRUNK

if TYPE_CHECKING:
    import pandas as pd

LIKELIEST_CHANCE = 0.05
"""A boundary that chance gives more often is not stated."""
MOST_LISTED = 8
"""Boundaries of single combinations that a sentence lists."""

Side = Literal["below", "above"]

_CRITICAL: tuple[tuple[str, bool, str], ...] = (
    ("critical_lr_dominant", False, "that of the dominant part"),
    ("critical_lr_bulk", False, "that of the bulk part"),
    ("critical_sharpness", True, "2 / critical sharpness"),
    ("sharpness", True, "2 / sharpness"),
)
"""Columns that a critical learning rate comes from, whether as 2 over them, and in words."""


@dataclass(frozen=True)
class Edge:
    """The values on both sides of a boundary: the last that holds, the first that does not."""

    holds: float
    fails: float


@dataclass(frozen=True)
class Boundary:
    """A boundary between where a claim holds and where it does not.

    Attributes:
        key: the setting; for a ratio to the critical learning rate that of the learning rate.
        side: on which side of it the claim holds.
        edge: where it lies; for several combinations of the other settings: the outermost values.
        edges: of each combination of the other settings that has points on both sides, by what they
            are; empty for a boundary that is one value.
        chance: how often chance gives a boundary of this form.
        relative_to: what the critical learning rate was taken from; empty: not a ratio.
    """

    key: str
    side: Side
    edge: Edge
    edges: Mapping[str, Edge]
    chance: float
    relative_to: str = ""

    @property
    def is_stated(self) -> bool:
        """Whether it is unlikely enough by chance."""
        return self.chance <= LIKELIEST_CHANCE


@dataclass(frozen=True)
class PlaneVerdict:
    """What a claim's verdicts say of the whole plane.

    Attributes:
        counts: points by outcome; "diverged" (not judged, a run diverged) and "not judged" are two.
        boundaries: along a setting, and relative to the critical learning rate; also those that are
            not stated.
        counts_in_words: sentences without a capital and a full stop, also on an order that chance
            may have made.
        boundaries_in_words: a sentence for each boundary that is stated.
    """

    label: str
    counts: Mapping[str, int]
    boundaries: tuple[Boundary, ...]
    counts_in_words: tuple[str, ...]
    boundaries_in_words: tuple[str, ...]


def judge_plane(table: SweepTable, label: str, branch: str) -> PlaneVerdict:
    """What the verdicts on one claim say of the whole plane; see the rule above.

    Args:
        branch: whose critical learning rate is taken.
    """
    own = rows_where(table.verdicts, "label", label)
    outcomes = dict(zip(own["point"], own["outcome"], strict=True))
    every = len(table.sweep.points)
    counts = {name: sum(o == name for o in outcomes.values()) for name in SYMBOLS}
    counts["diverged"] = len(table.diverged - outcomes.keys())
    counts["not judged"] = every - len(outcomes) - counts["diverged"]
    decided = {point: o == "holds" for point, o in outcomes.items() if o != "undecided"}
    axes = varying(table.sweep)
    along = boundary_along(decided, table, axes)
    relative = _relative_to_critical(decided, table, axes, branch)
    found = tuple(boundary for boundary in (along, relative) if boundary is not None)
    stated = [boundary for boundary in found if boundary.is_stated]
    # Of the one value for the whole plane it is said that it may be chance; of the others nothing.
    doubtful = [b for b in found if not (b.is_stated or b.edges or b.relative_to)]
    return PlaneVerdict(
        label,
        counts,
        found,
        (
            _counted(counts, every),
            *_why_undecided(own),
            *(_unstated(b, len(decided)) for b in doubtful),
        ),
        tuple(_in_words(boundary, axes) for boundary in stated),
    )


def boundary_along(
    decided: Mapping[int, bool], table: SweepTable, axes: Sequence[Axis]
) -> Boundary | None:
    """The boundary along one of the numerical settings; None where none separates all points.

    Args:
        decided: by the place of a decided point: whether the claim holds there.
        axes: the settings that differ.
    """
    holding, ways = sum(decided.values()), comb(len(decided), sum(decided.values()))
    if not 0 < holding < len(decided):
        return None
    numerical = [axis for axis in axes if axis.numerical]
    lines = {axis.key: _lines(decided, table, axis, axes) for axis in numerical}
    whole = {axis.key: _merged(lines[axis.key].values()) for axis in numerical}
    by_chance = sum(_orders([whole[axis.key]], holding) for axis in numerical) / ways
    for axis in numerical:
        for side in ("below", "above"):
            edge = _edge(whole[axis.key], side)
            if edge is not None:
                return Boundary(axis.key, side, edge, {}, by_chance)
    by_chance = sum(_orders(lines[axis.key].values(), holding) for axis in numerical) / ways
    found = [
        Boundary(axis.key, side, _outermost(edges.values(), side), edges, by_chance)
        for axis in numerical
        for side in ("below", "above")
        if (edges := _edges(lines[axis.key], side)) is not None
        and len(edges) > max(1, len(lines[axis.key]) / 2)
    ]
    return max(found, key=lambda boundary: len(boundary.edges), default=None)


_Line = Sequence[tuple[float, bool]]
"""Values of a setting, and whether the claim holds there."""


def _lines(
    decided: Mapping[int, bool], table: SweepTable, axis: Axis, axes: Sequence[Axis]
) -> dict[str, _Line]:
    """The decided points along a setting, for each combination of the others."""
    others = [other for other in axes if other.key != axis.key]
    lines: dict[str, list[tuple[float, bool]]] = {}
    for number_, holds in decided.items():
        point = table.sweep.points[number_]
        of = ", ".join(f"{o.key} = {setting_text(point.settings.get(o.key))}" for o in others)
        lines.setdefault(of, []).append((axis.number(point), holds))
    return {of: sorted(line) for of, line in lines.items()}


def _merged(lines: Iterable[_Line]) -> _Line:
    return sorted(place for line in lines for place in line)


def _edge(line: _Line, side: Side) -> Edge | None:
    """Where a line goes from holding to not holding, once and for all; None where it does not."""
    holds = [value for value, is_held in line if is_held]
    fails = [value for value, is_held in line if not is_held]
    if not holds or not fails:
        return None
    if side == "below":
        return Edge(max(holds), min(fails)) if max(holds) < min(fails) else None
    return Edge(min(holds), max(fails)) if min(holds) > max(fails) else None


def _edges(lines: Mapping[str, _Line], side: Side) -> dict[str, Edge] | None:
    """The boundary of each line that has both outcomes; None where one is not separated."""
    mixed = {of: line for of, line in lines.items() if len({held for _, held in line}) > 1}
    edges = {of: _edge(line, side) for of, line in mixed.items()}
    found = {of: edge for of, edge in edges.items() if edge is not None}
    return found if len(found) == len(edges) else None


def _outermost(edges: Iterable[Edge], side: Side) -> Edge:
    """From the last value that holds for every line to the first that holds for none."""
    known = list(edges)
    first, last = (min, max) if side == "below" else (max, min)
    return Edge(first(edge.holds for edge in known), last(edge.fails for edge in known))


def _orders(lines: Iterable[_Line], holding: int) -> int:
    """In how many ways can `holding` points hold so that all lines are separated alike?

    Holding below: the coefficient of x^holding in the product over lines of sum_c x^c, with c the
    possible numbers of points below a boundary; points of one value are on one side of it. Holding
    above: the coefficient of x^(points - holding).
    """
    ways = {0: 1}
    points = 0
    for line in lines:
        values = [value for value, _ in line]
        cuts = [0, *(at + 1 for at, (a, b) in enumerate(pairwise(values)) if a < b), len(values)]
        points += len(values)
        longer: dict[int, int] = {}
        for (count, number_), cut in product(ways.items(), cuts):
            longer[count + cut] = longer.get(count + cut, 0) + number_
        ways = longer
    return ways.get(holding, 0) + ways.get(points - holding, 0)


# Relative to the critical learning rate.


def is_learning_rate(key: str) -> bool:
    """Whether a key is that of a learning rate, such as `phases.0.optimizer.lr`."""
    return key.rpartition(".")[2] in ("lr", "learning_rate")


def _relative_to_critical(
    decided: Mapping[int, bool], table: SweepTable, axes: Sequence[Axis], branch: str
) -> Boundary | None:
    holding, ways = sum(decided.values()), comb(len(decided), sum(decided.values()))
    rate = next((axis for axis in axes if axis.numerical and is_learning_rate(axis.key)), None)
    if rate is None or not 0 < holding < len(decided):
        return None
    sources = [
        (*_critical_rates(table, column, is_curvature, branch), words)
        for column, is_curvature, words in _CRITICAL
    ]
    known = [source for source in sources if decided.keys() <= source[0].keys()]
    for critical, whose, words in known:
        line = sorted(
            (rate.number(table.sweep.points[n]) / critical[n], held) for n, held in decided.items()
        )
        for side in ("below", "above"):
            edge = _edge(line, side)
            if edge is not None:
                said = f"{words} at the end of {whose}"
                return Boundary(rate.key, side, edge, {}, 2 * len(known) / ways, said)
    return None


def _critical_rates(
    table: SweepTable, column: str, is_curvature: bool, branch: str
) -> tuple[dict[int, float], str]:
    """The critical learning rate by point (geometric mean over seeds), and of which branch."""
    if column not in table.runs.columns:
        return {}, ""
    for whose in (branch, TRUNK):
        rows = rows_where(table.runs, "branch", whose)
        logs: dict[int, list[float]] = {}
        for point, value in zip(rows["point"], rows[column], strict=True):
            if math.isfinite(value) and value > 0:
                logs.setdefault(point, []).append(math.log(2 / value if is_curvature else value))
        if logs:
            return {n: math.exp(math.fsum(of) / len(of)) for n, of in logs.items()}, whose
    return {}, ""


# In words.


def _counted(counts: Mapping[str, int], every: int) -> str:
    text = f"holds at {counts['holds']} of {every} points"
    if counts["holds"] == every > 1:
        return f"holds at all {every} points"
    others = [
        f"{said} at {counts[name]}"
        for name, said in (("does not hold", "does not hold"), ("undecided", "is undecided"))
        if counts[name]
    ]
    if counts["diverged"]:
        others.append(f"its runs diverged at {counts['diverged']}")
    if counts["not judged"]:
        others.append(f"is not judged yet at {counts['not judged']}")
    return ", ".join([text, *others])


def _why_undecided(verdicts: pd.DataFrame) -> list[str]:
    """Why most points are undecided, where that is one reason."""
    reasons = [why for why in rows_where(verdicts, "outcome", "undecided")["note"] if why]
    if not reasons:
        return []
    why, times = Counter(reasons).most_common(1)[0]
    return [f"undecided at {times}: {why}"] if times > 1 else []


def _in_words(boundary: Boundary, axes: Sequence[Axis]) -> str:
    axis = next(axis for axis in axes if axis.key == boundary.key)
    edge, is_below = boundary.edge, boundary.side == "below"
    if boundary.relative_to:
        middle = number(math.sqrt(edge.holds * edge.fails))
        return (
            f"holds for {axis.key} {boundary.side} about {middle} of the critical one"
            f" ({boundary.relative_to}): {'up to' if is_below else 'from'} {number(edge.holds)} it"
            f" does, {'from' if is_below else 'up to'} {number(edge.fails)}"
            f" {'on ' if is_below else ''}it does not"
        )
    if boundary.edges:
        return _moving(boundary, axis)
    sign, other = ("≤", "≥") if is_below else ("≥", "≤")
    text = dict(zip(axis.values, axis.labels, strict=True))  # type: ignore[arg-type]
    values = [float(value) for value in axis.values]  # type: ignore[arg-type]
    inside = sum(v <= edge.holds if is_below else v >= edge.holds for v in values)
    outside = sum(v >= edge.fails if is_below else v <= edge.fails for v in values)
    rest = "not above" if is_below else "not below"
    if inside + outside < len(values):
        rest = f"not for {axis.key} {other} {text[edge.fails]}; between is undecided"
    return (
        f"holds for {axis.key} {sign} {text[edge.holds]} ({inside} of {len(values)} values), {rest}"
    )


def _moving(boundary: Boundary, axis: Axis) -> str:
    word = "up to" if boundary.side == "below" else "from"
    listed = [
        f"{setting_text(edge.holds)} ({of})" if of else setting_text(edge.holds)
        for of, edge in list(boundary.edges.items())[:MOST_LISTED]
    ]
    more = len(boundary.edges) - len(listed)
    return (
        f"holds for {axis.key} {word} a boundary that the other settings move, and not"
        f" {'above' if boundary.side == 'below' else 'below'} it: {word} " + ", ".join(listed)
        + (f", and {more} more" if more else "")
    )  # fmt: skip


def _unstated(boundary: Boundary, decided: int) -> str:
    sign = "≤" if boundary.side == "below" else "≥"
    return (
        f"so far it holds just where {boundary.key} {sign} {setting_text(boundary.edge.holds)}, but"
        f" chance alone orders {decided} decided points like this in {boundary.chance:.0%} of"
        " cases: no boundary is stated"
    )
