"""How does the command line change a spec?

Every value has an option, its key path: `--phases.0.optimizer.lr 0.1`. A few have a short form.
The changes are made in the tables as they were read, before anything is validated, so that there
is one validation for all sources. Phases go by number or by name; `-` and `_` are the same;
`unset` takes back what the file says, so that the default holds.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from thalweg.errors import InvalidInput, shown
from thalweg.lab.config.fields import Location, Place, dotted, value_at, walk
from thalweg.lab.config.messages import nearest
from thalweg.lab.tables import parse_value
from thalweg.limits import check_limit

SHORT_FORMS: dict[str, str] = {
    "lr": "phases.*.optimizer.lr",
    "batch_size": "phases.*.batch_size",
    "steps": "branches.*.steps",
    "samples": "problem.samples",
    "data_dir": "problem.data.data_dir",
    "k": "subspace.k",
    "seed": "seeds",
}
"""Short forms and what they stand for; `*` is every phase, or every branch."""

UNSET = "unset"
FREE_NAMES = ("branches", "probes")
"""Tables whose keys are names of the user's own, in which `-` and `_` may differ."""


class Words(tuple[str, ...]):
    """The words given to an option, before it is known what they are to be."""

    __slots__ = ()


def parse_overrides(arguments: Sequence[str]) -> dict[str, Words]:
    """Options and their words: `--key value`, `--key=value`, `--key 0 1 2`, `--flag`.

    Raises:
        InvalidInput: a word belongs to no option.
    """
    found: dict[str, list[str]] = {}
    key = None
    for word in arguments:
        if word.startswith("--") and len(word) > 2:
            key, equals, value = word[2:].partition("=")
            found.pop(key, None)  # the last one holds
            found[key] = [value] if equals else []
        elif key is None:
            raise InvalidInput(
                f"command line: got {word!r}, allowed: --KEY VALUE; put its key first"
            )
        else:
            found[key].append(word)
    return {key: Words(words) for key, words in found.items()}


def apply_overrides(
    raw: Mapping[str, Any], overrides: Mapping[str, Any], model: type[BaseModel]
) -> tuple[dict[str, Any], list[Location]]:
    """The tables with the overrides made, and the key paths that come from them.

    Args:
        overrides: by key path, `Words` from the command line or values as they are.
        model: what the tables are to become; it decides how words are read.

    Raises:
        InvalidInput: a key path leads nowhere.
    """
    changed = _copy(raw)
    locations: list[Location] = []
    sources: list[Location] = []
    paths = [(SHORT_FORMS.get(key.replace("-", "_"), key), key) for key in overrides]
    # A table before the keys in it, all phases before a single one: the more precise word holds.
    for path, key in sorted(paths, key=lambda pair: (pair[0].count("."), "*" not in pair[0])):
        value = overrides[key]
        dots = path.count(".")
        check_limit("spec_depth", dots, f"command line: --{shown(key, 80)}", f"{dots} dots")
        for location in _locations(changed, path, key):
            place, reached = walk(model, location, changed)
            known = place if reached == location else None
            read = _read(value, known, key) if isinstance(value, Words) else _copy(value)
            sources.append(_set(changed, location, read))
            locations.append(location)
    for location in locations:
        _drop_other_end(changed, location, locations)
    return changed, sources


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list | tuple) else value


def _locations(raw: dict[str, Any], path: str, key: str) -> list[Location]:
    """The key paths that a dotted path stands for: several where it has a `*`."""
    found: list[tuple[Location, list[str]]] = [((), path.split("."))]
    done: list[Location] = []
    while found:
        location, parts = found.pop(0)
        if not parts:
            done.append(location)
            continue
        if not parts[0]:
            raise InvalidInput(f"command line: --{key}: a key path has names between its dots")
        for step, rest in _steps(value_at(raw, location), location, parts, key):
            found.append(((*location, step), rest))
    return done


def _steps(
    table: Any, location: Location, parts: list[str], key: str
) -> list[tuple[str | int, list[str]]]:
    """The next steps along a path, each with what remains of the path."""
    first, rest = parts[0], parts[1:]
    if location == ("phases",):
        return [(number, rest) for number in _phase_numbers(table, first, key)]
    if location in [(name,) for name in FREE_NAMES]:
        names = list(table) if isinstance(table, Mapping) else []
        if first == "*":
            if not names:
                raise InvalidInput(f"command line: --{key}: the spec has no {location[0]}")
            return [(name, rest) for name in names]
        return [_free_name(names, parts)]
    if isinstance(table, list):
        if not (first.isdecimal() and len(first) < 10 and int(first) < len(table)):
            allowed = f"a number below {len(table)} after {dotted(location)}"
            raise InvalidInput(f"command line: --{key}: got {first!r}, allowed: {allowed}")
        return [(int(first), rest)]
    return [(first.replace("-", "_"), rest)]


def _phase_numbers(phases: Any, part: str, key: str) -> list[int]:
    listed = phases if isinstance(phases, list) else []
    if part == "*" and listed:
        return list(range(len(listed)))
    names = [str(phase.get("name", "train")) if isinstance(phase, dict) else "" for phase in listed]
    numbers = [str(number) for number in range(len(listed))]
    if part in numbers:
        return [int(part)]
    matching = [number for number, name in enumerate(names) if _same(name, part)]
    if matching:
        return matching
    known = [*numbers, *names]
    allowed = "one of " + ", ".join(known) if known else "a file with phases"
    raise InvalidInput(
        f"command line: --{key}: no phase {part!r}, allowed: {allowed}{nearest(part, known)}"
    )


def _free_name(names: list[str], parts: list[str]) -> tuple[str, list[str]]:
    """The longest known name that the path goes on with (names may have dots), or a new name."""
    for length in range(len(parts), 0, -1):
        given = ".".join(parts[:length])
        for name in names:
            if _same(name, given):
                return name, parts[length:]
    return parts[0], parts[1:]


def _same(name: str, given: str) -> bool:
    return name.replace("-", "_") == given.replace("-", "_")


def _set(raw: dict[str, Any], location: Location, value: Any) -> Location:
    """Put a value at a key path, making tables on the way; returns the first key that is new."""
    table: Any = raw
    new = None
    for depth, step in enumerate(location[:-1], start=1):
        inner: Any = value_at(table, (step,))
        if isinstance(inner, str):  # the short form of a choice: "mlp" for { name = "mlp" }
            inner = {"name": inner}
        elif not isinstance(inner, dict | list):
            inner = {}
            new = new or location[:depth]
        table[step] = inner
        table = inner
    if not (isinstance(value, str) and value == UNSET):
        table[location[-1]] = value
    elif value_at(table, location[-1:]) is not None:
        del table[location[-1]]
    return new or location


def _drop_other_end(raw: Any, location: Location, overridden: list[Location]) -> None:
    """A phase ends by steps or by epochs: the one on the command line replaces the file's other."""
    other = {"steps": "epochs", "epochs": "steps"}.get(str(location[-1]))
    if other is None or (*location[:-1], other) in overridden:
        return
    table = value_at(raw, location[:-1])
    if isinstance(table, dict) and location[-1] in table:
        table.pop(other, None)


def _read(words: Words, place: Place | None, key: str) -> Any:
    """The value that words stand for, where that kind of value is allowed."""
    if len(words) > 1:
        return [_scalar(word, _item(place), key) for word in words]
    if not words:
        if place is not None and not place.accepts(bool):
            raise InvalidInput(f"command line: --{key}: no value, allowed: {place.allowed()}")
        return True
    if words[0] == UNSET:
        return UNSET
    if place is not None and place.accepts(tuple) and not words[0].lstrip().startswith("["):
        return [_scalar(word, _item(place), key) for word in words[0].split(",") if word]
    return _scalar(words[0], place, key)


def _item(place: Place | None) -> Place | None:
    return place.into(0, None) if place is not None else None


def _scalar(word: str, place: Place | None, key: str) -> Any:
    """A TOML value; text where it is none, or where nothing but text is allowed."""
    kinds = [kind for kind in (bool, int, float, tuple, dict) if place and place.accepts(kind)]
    if place is not None and place.accepts(str) and not kinds and not word.startswith("{"):
        return word
    try:
        parsed = parse_value(f"value = {word}", f"command line: --{key}")
    except tomllib.TOMLDecodeError:
        return word
    value = parsed.get("value")
    plain = isinstance(value, bool | int | float | str | list | dict)
    return value if plain and len(parsed) == 1 else word
