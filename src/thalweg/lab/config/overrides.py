"""How does the command line change a spec?

Every value has an option, its key path: `--phases.0.optimizer.lr 0.1`. A few have a short form,
and a path that begins with a key of a phase, `--optimizer.momentum 0.9`, is about every phase.
The changes are made in the tables as they were read, before anything is validated, so that there
is one validation for all sources. Phases go by number or by name; `-` and `_` are the same;
`unset` takes back what the file says, so that the default holds. `--seeds 0..4` is 0 1 2 3 4.

A branch or probe that the file does not have is one more only where that is plainly meant: a branch
that is given as a whole table, a probe that is registered. Another name is a mistake of typing.
"""

from __future__ import annotations

import re
import tomllib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from thalweg import registry
from thalweg.errors import InvalidInput, NotNeeded, shown
from thalweg.lab.config.fields import Location, Place, dotted, value_at, walk
from thalweg.lab.config.messages import nearest
from thalweg.lab.config.words import SHORT_FORMS
from thalweg.lab.tables import parse_value
from thalweg.limits import check_limit

UNSET = "unset"
FREE_NAMES = ("branches", "probes")
"""Tables whose keys are names of the user's own, in which `-` and `_` may differ."""


DATA_DIR: Location = ("problem", "data", "data_dir")
_RANGE = re.compile(r"(\d{1,18})\.\.(\d{1,18})")


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
    paths = [(full_path(key, model), key) for key in overrides]
    # A table before the keys in it, all phases before a single one: the more precise word holds.
    for path, key in sorted(paths, key=lambda pair: (pair[0].count("."), "*" not in pair[0])):
        value = overrides[key]
        dots = path.count(".")
        check_limit("spec_depth", dots, f"command line: --{shown(key, 80)}", f"{dots} dots")
        for location in _locations(changed, path, key):
            place, reached = walk(model, location, changed)
            if location == DATA_DIR != reached and key != path:
                _tell_not_needed(changed)
                continue
            _refuse_new_name(changed, location, key)
            known = place if reached == location else None
            words = _seeds(value, key) if location == ("seeds",) else value
            read = _read(words, known, key) if isinstance(words, Words) else _copy(words)
            sources.append(_set(changed, location, read))
            locations.append(location)
    for location in locations:
        _drop_other_end(changed, location, locations)
    return changed, sources


def full_path(key: str, model: type[BaseModel]) -> str:
    """The key path that a word of the command line stands for: a short form, or a key of a phase.

    Example:
        >>> from thalweg.lab.config import Spec
        >>> full_path("lr", Spec), full_path("optimizer.momentum", Spec), full_path("seeds", Spec)
        ('phases.*.optimizer.lr', 'phases.*.optimizer.momentum', 'seeds')
    """
    plain = key.replace("-", "_")
    if plain in SHORT_FORMS:
        return SHORT_FORMS[plain]
    first = plain.partition(".")[0]
    return (
        f"phases.*.{key}" if first not in model.model_fields and first in _of_phase(model) else key
    )


def is_known(key: str, model: type[BaseModel]) -> bool:
    """Whether the first word of a key path is a short form, or a key of a spec or of a phase."""
    first = full_path(key, model).partition(".")[0].replace("-", "_")
    return first in model.model_fields


def _of_phase(model: type[BaseModel]) -> tuple[str, ...]:
    """The keys of a phase, where the model has phases."""
    place, reached = walk(model, ("phases", 0), {})
    return tuple(place.keys({})) if reached == ("phases", 0) else ()


def _tell_not_needed(raw: Mapping[str, Any]) -> None:
    data = value_at(raw, ("problem", "data"))
    name = data.get("name") if isinstance(data, Mapping) else data
    warnings.warn(f"data_dir: not needed, the data set {name} reads no files", NotNeeded, 2)


def _refuse_new_name(raw: Mapping[str, Any], location: Location, key: str) -> None:
    """Refuse a key of a branch that there is not, and a probe that is not registered."""
    if location[:1] == ("branches",) and len(location) > 2:
        known, allowed = value_at(raw, ("branches",)), "one of the spec's branches"
        hint = '; a new branch is a whole table: --branches.NAME "{ split = { bulk = 0 } }"'
    elif location[:1] == ("probes",) and len(location) == 2:
        known, allowed, hint = registry.probes, "one of", ""
    else:
        return
    names = [str(name) for name in known] if isinstance(known, Mapping) else []
    given = str(location[1])
    if given not in names:
        what = {"branches": "branch", "probes": "probe"}[str(location[0])]
        listed = f"{allowed} {', '.join(names)}" if names else "none, the spec has no branches"
        near = nearest(given, names)
        raise InvalidInput(
            f"command line: --{key}: no {what} {shown(given, 80)}, allowed: {listed}{near or hint}"
        )


def _seeds(given: Any, key: str) -> Any:
    """Words with each `0..4` as the seeds from the first to the last."""
    if not isinstance(given, Words):
        return given
    words = [part for word in given for part in _parts_of_list(word)]
    found: list[str] = []
    for word in words:
        ends = _RANGE.fullmatch(word)
        if ends is None:
            found.append(word)
            continue
        first, last = int(ends[1]), int(ends[2])
        if last < first:
            allowed = f"the smaller seed first, {last}..{first}"
            raise InvalidInput(f"command line: --{key}: got {word!r}, allowed: {allowed}")
        check_limit("spec_values", last - first + 1, f"command line: --{key} {word}")
        found += [str(seed) for seed in range(first, last + 1)]
    return Words(found) if words != found else given


def _parts_of_list(word: str) -> list[str]:
    return [word] if ".." not in word else [part for part in word.split(",") if part]


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
