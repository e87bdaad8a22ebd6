"""What differs between several studies? Their settings, each under the shortest name that is plain.

The tables of each `spec.toml` are compared as they were read, without validating anything, so that
a thousand studies are compared in seconds. Left out is what never changes a number: seeds, names,
threads, claims, figures, checkpoints, where the data lies.

Example:
    >>> phase = {"optimizer": {"name": "sgd", "lr": 0.1}, "batch_size": 50}
    >>> other = {"optimizer": {"name": "sgd", "lr": 0.3}, "batch_size": "all"}
    >>> found = differences([{"phases": [phase]}, {"seeds": [1], "phases": [other]}])
    >>> found.settings
    [{'lr': 0.1, 'batch_size': 50}, {'lr': 0.3, 'batch_size': 'all'}]
    >>> found.paths["lr"]
    'phases.*.optimizer.lr'
"""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from thalweg.errors import ThalwegError
from thalweg.lab.config.fields import Location, dotted
from thalweg.lab.config.former_keys import with_present_keys
from thalweg.lab.config.layering import with_full_branches
from thalweg.lab.config.loading import MEASURED, NOT_HASHED
from thalweg.lab.config.words import SHORT_FORMS
from thalweg.lab.store import StudyFolder
from thalweg.lab.tables import parse_toml

Settings = dict[str, Any]
"""The value of each key: a number, text, true or false, or a list of these."""

LONGEST_LABEL = 48
"""Characters: beside a study's name, its data set and its hash a folder's name has room for it."""
MOST_IN_WORDS = 8
"""Settings on a line."""
EVERY = "*"
_LISTS = ("phases", "branches")
_LEFT_OUT = {(key,) for key in NOT_HASHED - {"branches"}} | {("format",), ("extends",)}
_LEFT_OUT |= {("problem", key) for key in MEASURED} | {("problem", "data", "data_dir")}
_LEFT_OUT |= {(table, EVERY, "name") for table in _LISTS}
_NOT_OF_A_NAME = re.compile(r"[^A-Za-z0-9._-]+")
_ABSENT = "absent"
Columns = dict[Location, tuple[str, ...]]


@dataclass(frozen=True)
class Differences:
    """What differs between studies.

    Attributes:
        settings: for each study, in the order given, its values by short name; a study that does
            not have a key has no entry.
        paths: the key path of each short name, such as "phases.*.optimizer.lr"; `*` stands for
            every phase, or every branch.
    """

    settings: list[Settings]
    paths: dict[str, str]


def differences(specs: Sequence[Mapping[str, Any]]) -> Differences:
    """What differs between the tables of several specs, as `parse_toml` gives them.

    Keys that an optimizer (or another choice) has and another one lacks are named only where they
    differ between studies of the same choice. Where studies have other branches, or another number
    of phases, their names are the setting `branches`, or `phases`, and those that all have are
    compared.
    """
    flat = [_flat(with_full_branches(spec)) for spec in specs]
    for table in _LISTS:
        _compare_common(flat, specs, table)
    columns = _columns(flat)
    merged = _merged(columns)
    found = [path for path in merged if len(set(columns[path])) > 1]
    found = [path for path in found if not _follows_from_choice(path, columns)]
    names = _short_names(dict.fromkeys(merged[path] for path in found), merged.values())
    settings: list[Settings] = [
        {names[merged[path]]: table[path] for path in found if path in table} for table in flat
    ]
    return Differences(settings, {name: dotted(path) for path, name in names.items()})


def differences_of(studies: Sequence[StudyFolder]) -> Differences:
    """What differs between studies on disk.

    Raises:
        InvalidInput: a folder has no `spec.toml`, or it is no TOML.
        IntegrityError: it is damaged.
    """
    return differences([_tables(study) for study in studies])


def settings_beside(studies: Sequence[StudyFolder]) -> list[Settings]:
    """For each study what it does otherwise than others of the same phases and branches.

    So that studies of other kinds in the same folder do not make every setting one that differs.
    Those whose `spec.toml` cannot be read have none.
    """
    kinds: dict[Any, list[int]] = {}
    specs: dict[int, Mapping[str, Any]] = {}
    for number, study in enumerate(studies):
        try:
            specs[number] = _tables(study)
        except (ThalwegError, OSError):
            continue
        kind = tuple(frozenset(_names(specs[number], table)) for table in _LISTS)
        kinds.setdefault(kind, []).append(number)
    found: list[Settings] = [{} for _ in studies]
    for numbers in kinds.values():
        own = differences([specs[number] for number in numbers]).settings
        for number, settings in zip(numbers, own, strict=True):
            found[number] = settings
    return found


def in_words(settings: Mapping[str, Any], most: int = MOST_IN_WORDS) -> str:
    """Settings on one line, the first ones of very many.

    Example:
        >>> in_words({"lr": 0.1, "hidden": [100, 100], "optimizer": "adam"})
        'lr 0.1, hidden [100, 100], optimizer adam'
    """
    words = [f"{key} {plain_value(value)}" for key, value in settings.items()]
    more = [f"{len(words) - most} more"] if len(words) > most else []
    return ", ".join([*words[:most], *more])


def plain_value(value: Any) -> Any:
    """A setting as a cell of a table: a number, text, or true or false; a list as text."""
    return value if isinstance(value, bool | int | float | str) else json.dumps(value)


def folder_label(settings: Mapping[str, Any], longest: int = LONGEST_LABEL) -> str:
    """Settings as a part of a folder's name, cut where it is long.

    Args:
        settings: values by key, or by key path, of which the last word is taken where it is plain.
        longest: characters.

    Example:
        >>> folder_label({"lr": 0.03, "batch_size": "all"})
        'lr-0.03_batch_size-all'
        >>> folder_label({"problem.model.hidden": [100, 100]})
        'hidden-100x100'
    """
    last = Counter(key.rpartition(".")[2] for key in settings)
    names = {key: short if last[short := key.rpartition(".")[2]] == 1 else key for key in settings}
    parts = [f"{names[key]}-{short_text(value)}" for key, value in settings.items()]
    label = _NOT_OF_A_NAME.sub("-", "_".join(parts)).lstrip("._-")
    return label[:longest].rstrip("._-")


def short_text(value: Any) -> str:
    """A setting in few characters, for names and labels.

    Example:
        >>> short_text([100, 100]), short_text({"name": "sgd", "lr": 0.1})
        ('100x100', 'sgd-lr-0.1')
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "x".join(short_text(item) for item in value)
    if isinstance(value, Mapping):
        named = [str(value["name"])] if "name" in value else []
        others = [f"{key}-{short_text(item)}" for key, item in value.items() if key != "name"]
        return "-".join([*named, *others])
    return str(value).replace("+", "")


def _tables(study: StudyFolder) -> dict[str, Any]:
    """The tables of a study's spec, with keys as they are called now."""
    source = str(study.spec_file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return with_present_keys(parse_toml(study.spec_text, source), source)


def _flat(value: Any, path: Location = ()) -> dict[Location, Any]:
    """The values by key path, without those that never change a number."""
    if _with_star(path) in _LEFT_OUT:
        return {}
    if isinstance(value, Mapping):
        inner = [((*path, key), item) for key, item in value.items()]
    elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
        inner = [((*path, number), item) for number, item in enumerate(value)]
    else:
        return {path: value}
    return {place: item for where, one in inner for place, item in _flat(one, where).items()}


def _with_star(path: Location) -> Location:
    return (path[0], EVERY, *path[2:]) if len(path) > 2 and path[0] in _LISTS else path


def _names(spec: Mapping[str, Any], table: str) -> list[Any]:
    """The branches, or the numbers of the phases."""
    given = spec.get(table)
    if isinstance(given, Mapping):
        return list(given)
    return list(range(len(given))) if isinstance(given, list | tuple) else []


def _compare_common(
    flat: Sequence[dict[Location, Any]], specs: Sequence[Mapping[str, Any]], table: str
) -> None:
    """Where studies have other branches or phases: their names, and the settings of the common."""
    names = [_names(spec, table) for spec in specs]
    if all(set(own) == set(names[0]) for own in names):
        return
    common = set(names[0]).intersection(*names)
    for values, spec, own in zip(flat, specs, names, strict=True):
        for path in [p for p in values if p[0] == table and len(p) > 1 and p[1] not in common]:
            del values[path]
        values[(table,)] = [_phase_name(spec, n) for n in own] if table == "phases" else own


def _phase_name(spec: Mapping[str, Any], number: int) -> str:
    phase = spec["phases"][number]
    return str(phase.get("name", number)) if isinstance(phase, Mapping) else str(number)


def _columns(flat: Sequence[Mapping[Location, Any]]) -> Columns:
    """The values of each key path over the studies, as text: lists are in no set, true is not 1."""
    texts = [{path: repr(value) for path, value in table.items()} for table in flat]
    every = dict.fromkeys(path for table in texts for path in table)
    return {path: tuple(table.get(path, _ABSENT) for table in texts) for path in every}


def _follows_from_choice(path: Location, columns: Columns) -> bool:
    """Whether a key that some lack has one value with each `name` of its table that has it."""
    name, own = (*path[:-1], "name"), columns[path]
    if name == path or name not in columns or _ABSENT not in own:
        return False
    return len(set(zip(columns[name], own, strict=True))) == len(set(columns[name]))


def _is_taken_over(path: Location, columns: Columns) -> bool:
    """Whether a branch has just what the phase has that it starts from."""
    phases = [p[1] for p in columns if p[0] == "phases" and len(p) > 1 and isinstance(p[1], int)]
    above = ("phases", max(phases, default=0), *path[2:])
    return path[0] == "branches" and columns.get(above) == columns[path]


def _merged(columns: Columns) -> dict[Location, Location]:
    """Each path, with `*` for the phase or branch where every one has the key, with one value.

    Without what branches take over.
    """
    alike: dict[Location, list[Location]] = {}
    entries: dict[str | int, set[str | int]] = {}
    for path in columns:
        alike.setdefault(_with_star(path), []).append(path)
        entries.setdefault(path[0], set()).add(path[1] if len(path) > 1 else "")
    every = {
        star: len(those) == len(entries[star[0]]) and len({columns[path] for path in those}) == 1
        for star, those in alike.items()
    }
    own = [path for path in columns if not _is_taken_over(path, columns)]
    return {path: star if every[star := _with_star(path)] else path for path in own}


def _short_names(paths: Iterable[Location], every: Iterable[Location]) -> dict[Location, str]:
    """The short form of each path, or the shortest end of it that no other path has."""
    short = {path: name for name, path in reversed(SHORT_FORMS.items())}
    ends = Counter(end for path in dict.fromkeys(every) for end in _ends(path))
    found: dict[Location, str] = {}
    for path in paths:
        plain = [end for end in _ends(path) if ends[end] == 1 and end not in SHORT_FORMS]
        found[path] = short.get(dotted(path)) or (plain[0] if plain else dotted(path))
    return found


def _ends(path: Location) -> list[str]:
    """The ends of a key path, from the shortest; the `name` of a choice is the choice."""
    if path[-1] == "name" and len(path) > 1:
        path = path[:-1]
    starts = [n for n in reversed(range(len(path))) if isinstance(path[n], str)]
    return [dotted(path[start:]) for start in starts if path[start] != EVERY]
