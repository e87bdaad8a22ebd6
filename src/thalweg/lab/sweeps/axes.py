"""Which settings does a sweep try? Axes: keys with their values, and how they are combined.

On the command line, and the same in the table `[sweep]` of a spec:

    --grid lr=0.01,0.1 --grid batch_size=10,all       every combination: 4 points
    --zip lr=0.01,0.1 --zip batch_size=10,50          side by side: 2 points
    --random lr=log:0.001:1 --draws 20                drawn: 20 points
    [[sweep.list]] lr = 0.1, batch_size = 10          one by one, in a spec alone

A grid, a zip, drawn points and a list given together are combined: every one with every other.
A key is that of an option of `thalweg run`; `log:0.001:1:7` are 7 values from 0.001 to 1 with equal
ratios, `linear:0:1:5` 5 with equal distances. Numbers that are drawn between whole ends are whole:
`linear:1:9` or `log:8:512` for a width, `linear:0.0:1` for a rate.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from thalweg.errors import InvalidInput, invalid, shown
from thalweg.lab.sweeps.points import Setting
from thalweg.lab.tables import parse_value
from thalweg.limits import check_limit

Settings = dict[str, Setting]
SCALES = ("linear", "log")
WHOLE = 1e-9
"""How close to whole numbers all values are that are meant as such: 10, 20, 30."""
DIGITS = 6
"""Significant digits of a value that was computed: names and tables are to be read by people."""


@dataclass(frozen=True)
class Axes:
    """What a sweep tries.

    Attributes:
        grid: values of each key, all of them combined.
        zip: values of each key, taken side by side; as many for each.
        random: where values are drawn, a `Range` or a list of values for each key.
        draws: how many points are drawn.
        seed: of the drawing.
        list: points one by one.
    """

    grid: Mapping[str, Sequence[Setting]] = field(default_factory=dict)
    zip: Mapping[str, Sequence[Setting]] = field(default_factory=dict)
    random: Mapping[str, Range | Sequence[Setting]] = field(default_factory=dict)
    draws: int = 10
    seed: int = 0
    list: Sequence[Settings] = ()

    def settings(self) -> list[Settings]:
        """The settings of every point, the last key of the grid varying fastest.

        Raises:
            InvalidInput: a key stands in two places, a zip has lists of two lengths, or there are
                more points than the limit.
        """
        self._check()
        parts: list[Sequence[Settings]] = [
            *([self.list] if self.list else []),
            *([self._drawn()] if self.random else []),
            *([_side_by_side(self.zip)] if self.zip else []),
            *([{key: value} for value in values] for key, values in self.grid.items()),
        ]
        check_limit("sweep_points", math.prod(map(len, parts)), "sweep")
        combined = itertools.product(*parts)
        points = (dict(itertools.chain.from_iterable(map(dict.items, one))) for one in combined)
        return list({json.dumps(point, sort_keys=True): point for point in points}.values())

    def _check(self) -> None:
        listed = {key for point in self.list for key in point}
        places = [*self.grid, *self.zip, *self.random, *listed]
        if twice := [key for key in places if places.count(key) > 1]:
            raise invalid("sweep", twice[0], "each key in one of grid, zip, random and list")
        drawn = {k: values for k, values in self.random.items() if not isinstance(values, Range)}
        for key, values in {**self.grid, **self.zip, **drawn}.items():
            _check_values(key, values)
        for key, value in (pair for point in self.list for pair in point.items()):
            _check_values(key, [value])
        lengths = {key: len(values) for key, values in self.zip.items()}
        if len(set(lengths.values())) > 1:
            given = ", ".join(f"{count} of {key}" for key, count in lengths.items())
            raise invalid("zip", given, "as many values of each key")
        if self.draws < 1:
            raise invalid("draws", self.draws, "an integer >= 1")

    def _drawn(self) -> Sequence[Settings]:
        generator = random.Random(self.seed)
        return [
            {key: _draw(where, generator) for key, where in self.random.items()}
            for _ in range(self.draws)
        ]


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, evenly or by equal ratios; whole ones between whole ends.

    Raises:
        InvalidInput: the ends are no finite numbers in order, or a log range goes to zero.
    """

    low: float
    high: float
    scale: str = "linear"

    def __post_init__(self) -> None:
        for key in ("low", "high"):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise invalid(f"range: {key}", value, "a number")
            if not math.isfinite(value):
                raise invalid(f"range: {key}", value, "a finite number")
        if self.scale not in SCALES:
            raise invalid("range: scale", self.scale, "'linear' or 'log'")
        if not self.low < self.high:
            raise invalid("range", f"{self.low} to {self.high}", "a low end below the high one")
        if self.scale == "log" and self.low <= 0:
            raise invalid("range: low", self.low, "a number above zero on a log scale")

    def at(self, place: float) -> int | float:
        """The number at a place from 0 (low) to 1 (high); a whole one between whole ends."""
        return self.rounded(self._between(place))

    def rounded(self, value: float) -> int | float:
        """A number as it stands in a name: whole between whole ends, else of few digits."""
        if isinstance(self.low, int) and isinstance(self.high, int):
            return round(value)
        return _few_digits(value)

    def values(self, count: int) -> list[Setting]:
        """So many of its numbers, both ends among them."""
        if not isinstance(count, int) or isinstance(count, bool) or count < 2:
            raise invalid("range: points", count, "an integer >= 2")
        check_limit("sweep_points", count, "range: points")
        found = [self._between(number / (count - 1)) for number in range(count)]
        if all(math.isclose(value, round(value), rel_tol=WHOLE) for value in found):
            return [self.rounded(value) for value in found]
        return [_few_digits(value) for value in found]

    def _between(self, place: float) -> float:
        if self.scale == "log":
            return math.exp(math.log(self.low) * (1 - place) + math.log(self.high) * place)
        return self.low * (1 - place) + self.high * place


def _few_digits(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def axes_from_words(
    grid: Sequence[str] = (),
    zipped: Sequence[str] = (),
    drawn: Sequence[str] = (),
    draws: int | None = None,
    seed: int = 0,
) -> Axes:
    """The axes that the words of a command line stand for: `lr=0.1,0.2`, `lr=log:0.001:1:7`.

    Raises:
        InvalidInput: a word is none of that, or a key comes twice.
    """
    if drawn and draws is None:
        raise InvalidInput("--random: say how many points are drawn: --draws N")
    if draws is not None and not drawn:
        raise InvalidInput("--draws: nothing is drawn; say where: --random KEY=log:0.001:1")
    return Axes(
        grid=_pairs("--grid", grid, _values),
        zip=_pairs("--zip", zipped, _values),
        random=_pairs("--random", drawn, _range_or_values),
        draws=draws or 1,
        seed=seed,
    )


def axes_from_table(table: Any, source: str) -> Axes:
    """The axes that the table `[sweep]` of a spec stands for.

    Raises:
        InvalidInput: it has another key, or a value that is none.
    """
    allowed = ("grid", "zip", "random", "list", "draws", "seed")
    if not isinstance(table, Mapping) or not set(table) <= set(allowed):
        given = sorted(set(table) - set(allowed)) if isinstance(table, Mapping) else table
        raise invalid(f"{source}: sweep", given, "a table with " + ", ".join(allowed))
    grid, zipped, drawn = (_table(table, key, source) for key in ("grid", "zip", "random"))
    listed = table.get("list", [])
    if not (isinstance(listed, list) and all(isinstance(point, Mapping) for point in listed)):
        raise invalid(f"{source}: sweep.list", listed, "tables of settings")
    numbers = {key: table[key] for key in ("draws", "seed") if key in table}
    if wrong := [k for k, n in numbers.items() if not isinstance(n, int) or isinstance(n, bool)]:
        raise invalid(f"{source}: sweep.{wrong[0]}", numbers[wrong[0]], "an integer")
    return Axes(
        grid={key: _values_given(value, f"sweep.grid.{key}") for key, value in grid.items()},
        zip={key: _values_given(value, f"sweep.zip.{key}") for key, value in zipped.items()},
        random={key: _range_given(value, f"sweep.random.{key}") for key, value in drawn.items()},
        list=[_flat(point) for point in listed],
        **numbers,
    )


def joined(one: Axes, other: Axes) -> Axes:
    """The axes of a spec, with those of the command line in the place of the same keys."""
    keys = {*other.grid, *other.zip, *other.random, *(key for point in other.list for key in point)}

    def kept(values: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in values.items() if key not in keys}

    points = [kept(point) for point in one.list] if not other.list else other.list
    return Axes(
        grid={**kept(one.grid), **other.grid},
        zip={**kept(one.zip), **other.zip},
        random={**kept(one.random), **other.random},
        draws=other.draws if other.random else one.draws,
        seed=other.seed if other.random else one.seed,
        list=[point for point in points if point],
    )


def _check_values(key: str, values: Sequence[Setting]) -> None:
    """Refuse what is no list, an empty one, and values that no spec can have, such as dates."""
    if isinstance(values, str) or not hasattr(values, "__len__"):
        raise invalid(f"values of {key}", values, "a list of values")
    if len(values) == 0:
        raise invalid(f"values of {key}", "none", "one or more, separated by commas")
    for value in values:
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            allowed = "numbers, text, true, false, lists or tables"
            raise invalid(f"values of {key}", value, allowed) from None


def _draw(where: Range | Sequence[Setting], generator: random.Random) -> Setting:
    return where.at(generator.random()) if isinstance(where, Range) else generator.choice(where)


def _side_by_side(zipped: Mapping[str, Sequence[Setting]]) -> list[Settings]:
    rows = zip(*zipped.values(), strict=True)
    return [dict(zip(zipped, row, strict=True)) for row in rows]


def _pairs(option: str, words: Sequence[str], read: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not (key and equals and value):
            raise invalid(option, word, "KEY=VALUE,VALUE,...")
        if key in found:
            raise invalid(option, word, f"{key} once, with all its values")
        found[key] = read(value, f"{option} {key}")
    return found


def _values(text: str, source: str) -> list[Setting]:
    """Values separated by commas, or so many of a range."""
    if text.partition(":")[0] not in SCALES:
        return [_scalar(word, source) for word in _parted(text)]
    scale, *numbers = text.split(":")
    if len(numbers) != 3:
        raise invalid(source, text, f"{scale}:LOW:HIGH:COUNT, such as {scale}:0.001:1:7")
    low, high, count = (_scalar(number, source) for number in numbers)
    if not isinstance(count, int) or isinstance(count, bool):
        raise invalid(source, text, "a whole number of values at the end")
    check_limit("sweep_points", count, source)
    return Range(low, high, scale).values(count)  # type: ignore[arg-type]  # checked there


def _range_or_values(text: str, source: str) -> Range | list[Setting]:
    if text.partition(":")[0] not in SCALES:
        return _values(text, source)
    scale, *numbers = text.split(":")
    if len(numbers) != 2:
        raise invalid(source, text, f"{scale}:LOW:HIGH, such as {scale}:0.001:1")
    low, high = (_scalar(number, source) for number in numbers)
    return Range(low, high, scale)  # type: ignore[arg-type]  # checked there


def _parted(text: str) -> Iterable[str]:
    """The parts between commas that are in no bracket."""
    depth, part = 0, ""
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0:
            yield part
            part = ""
        else:
            part += character
    yield part


def _scalar(word: str, source: str) -> Setting:
    """A value of TOML, or text."""
    if not word:
        raise invalid(source, word, "values separated by commas")
    try:
        parsed = parse_value(f"value = {word}", source)
    except tomllib.TOMLDecodeError:
        return word
    value = parsed.get("value")
    known = isinstance(value, bool | int | float | str | list | dict)
    return value if known and len(parsed) == 1 else word


def _table(table: Mapping[str, Any], key: str, source: str) -> dict[str, Any]:
    """A table of axes; `phases.0.lr` unquoted is a table in tables, and means the same."""
    found = table.get(key, {})
    if not isinstance(found, Mapping):
        raise invalid(f"{source}: sweep.{key}", shown(found), "a table: KEY = [VALUES]")
    return _flat(found)


def _flat(table: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping) and not {"low", "high"} <= value.keys():
            flat |= _flat(value, f"{before}{key}.")
        else:
            flat[f"{before}{key}"] = value
    return flat


def _values_given(value: Any, source: str) -> list[Setting]:
    if isinstance(value, list):
        return value
    if isinstance(value, Mapping) and set(value) <= {"low", "high", "points", "scale"}:
        return _range_given(value, source, points=True).values(value.get("points", 0))
    raise invalid(source, value, "a list of values, or { low, high, points, scale }")


def _range_given(value: Any, source: str, *, points: bool = False) -> Any:
    if isinstance(value, list) and not points:
        return value
    keys = {"low", "high", "scale"} | ({"points"} if points else set())
    if not (isinstance(value, Mapping) and {"low", "high"} <= set(value) <= keys):
        raise invalid(source, value, "a list of values, or { " + ", ".join(sorted(keys)) + " }")
    return Range(value["low"], value["high"], value.get("scale", "linear"))
