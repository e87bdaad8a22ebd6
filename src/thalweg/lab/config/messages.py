"""What is wrong with a spec, in one line for each mistake?

Each line names the source, the key, what was given, what is allowed, and the nearest known name.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from pydantic import BaseModel, ValidationError

from thalweg.errors import InvalidInput
from thalweg.errors import shown as as_words
from thalweg.lab.config.fields import Location, Place, all_keys, dotted, value_at, walk
from thalweg.lab.config.words import SHORT_FORMS, as_option, key_called

LONGEST_VALUE = 80
"""Characters of a given value that a message shows."""
MOST_LINES = 20
"""Mistakes that are told at once: a file of noise has as many as it has words."""


CAN_BE_OFF = [(key,) for key in ("clip_norm", "noise", "split", "local")]
"""Keys by which a branch says that it has not what the phase before it has."""


def explain(
    error: ValidationError,
    model: type[BaseModel],
    raw: Mapping[str, Any],
    source: str,
    overridden: Iterable[Location] = (),
    given: Mapping[str, Any] | None = None,
) -> InvalidInput:
    """The error for the user, from pydantic's.

    Args:
        raw: what was validated.
        source: the file's name, or what stands for it.
        overridden: key paths given on the command line, which is then named as the source.
        given: what was validated before branches took over what they do not say: a mistake is told
            where it was made.
    """
    lines: dict[Location, str] = {}
    items = error.errors(include_url=False, include_input=False)
    failed = {item["loc"][:length] for item in items for length in range(len(item["loc"]))}
    told: set[tuple[Location, str]] = set()
    for item in items:
        if item["type"] == "too_short" and item["loc"] in failed:
            continue  # an array counts as short where its items failed: these are named already
        on_command_line = _from_command_line(item["loc"], tuple(overridden))
        location, line = _line(item, model, raw, on_command_line=on_command_line)
        if given is not None and _is_taken_over(location, item["type"], given, told):
            continue
        if len(lines) == MOST_LINES and location not in lines:
            lines[()] = f"{source}: more mistakes than these {MOST_LINES}"
            break
        where = "command line" if on_command_line else source
        lines.setdefault(location, f"{where}: {line}")
    return InvalidInput("\n".join(lines.values()))


def shown(value: Any) -> str:
    """A value as it would stand in a spec, on one line, cut where it is long."""
    if isinstance(value, bool):
        text = str(value).lower()
    elif isinstance(value, list | tuple):
        text = "[" + ", ".join(shown(item) for item in islice(value, LONGEST_VALUE)) + "]"
    elif isinstance(value, Mapping):
        pairs = islice(value.items(), LONGEST_VALUE)
        text = "{" + ", ".join(f"{key} = {shown(item)}" for key, item in pairs) + "}"
    else:
        text = " ".join(as_words(value).split())
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 3] + "..."


def nearest(given: object, known: Iterable[str]) -> str:
    """The end of a message: the known name nearest to the one given; empty where none is near."""
    name = nearest_name(given, known)
    return "" if name is None else f"; did you mean {name!r}?"


def nearest_name(given: object, known: Iterable[str]) -> str | None:
    """The known name nearest to the one given, None where none is near."""
    names = {name.replace("-", "_").lower(): name for name in known}
    wanted = str(given)[:LONGEST_VALUE].replace("-", "_").lower()
    near = difflib.get_close_matches(wanted, names, n=1)
    return names[near[0]] if near else None


def _line(
    item: Any, model: type[BaseModel], raw: Any, *, on_command_line: bool
) -> tuple[Location, str]:
    """Key path and message of one of pydantic's errors."""
    if item["loc"][-1:] == ("[key]",):
        return _bad_name(model, item["loc"][:-1], raw)
    place, location = walk(model, item["loc"], raw)
    kind, context = item["type"], item.get("ctx", {})
    if kind == "extra_forbidden":
        location = tuple(item["loc"])
        hint = _other_key(model, place, location, raw, on_command_line=on_command_line)
        known, given = place.keys(value_at(raw, location[:-1])), shown(value_at(raw, location))
        line = f"{dotted(location)}: no such key (got {given}), allowed: {', '.join(known)}{hint}"
        return location, line
    key = dotted(location)
    if kind == "bad_value":
        hint = f"; {context['hint']}" if context["hint"] else ""
        given = "missing" if context["given"] is None else f"got {shown(context['given'])}"
        return location, f"{key}: {given}, allowed: {context['allowed']}{hint}"
    if kind in ("missing", "choice_missing"):
        return location, f"{key}: missing, allowed: {place.allowed()}"
    given = value_at(raw, location) if location else raw
    if kind in ("value_error", "assertion_error") and location != (
        "name",
    ):  # from a check in a user's own settings
        reason = " ".join(str(context.get("error", item["msg"])).split())
        return location, f"{key}: got {shown(given)}, {reason}"
    near = nearest(given, place.names()) if isinstance(given, str) else ""
    can_be_off = location[:1] == ("branches",) and location[2:] in CAN_BE_OFF
    allowed = place.allowed() + (" or 'off'" if can_be_off else "")
    return location, f"{key or 'spec'}: got {shown(given)}, allowed: {allowed}{near}"


def _bad_name(model: type[BaseModel], location: Location, raw: Any) -> tuple[Location, str]:
    table, above = walk(model, location[:-1], raw)
    allowed = table.key_place().allowed()
    return location, f"{dotted(above)}: got the name {shown(location[-1])}, allowed: {allowed}"


def _other_key(
    model: type[BaseModel], place: Place, location: Location, raw: Any, *, on_command_line: bool
) -> str:
    """The end of a message on a key that there is not: the one that may have been meant.

    In its table, or in another one: `lr` beside the optimizer instead of in it.
    """
    wanted, known = key_called(str(location[-1])), tuple(place.keys(value_at(raw, location[:-1])))
    paths: dict[str, Location] = {}
    for path in all_keys(Place(model), raw):
        paths.setdefault(str(path[-1]), path)
    if wanted not in known and on_command_line and wanted in SHORT_FORMS:
        return f"; did you mean --{wanted}?"
    if wanted in known or wanted not in paths:
        if near := nearest(wanted, known):
            return near
        wanted = nearest_name(wanted, paths) or ""
    found = paths.get(wanted)
    if found is None:
        return ""
    return f"; did you mean {as_option(found) if on_command_line else repr(dotted(found))}?"


def _is_taken_over(
    location: Location, kind: str, given: Mapping[str, Any], told: set[tuple[Location, str]]
) -> bool:
    """Whether a branch has a mistake from the phase that it starts from, which comes earlier."""
    mistake = (location[2:], kind)
    taken = mistake in told or location[2:] == ("name",)  # which is that of the table
    told.add(mistake)
    return taken and location[:1] == ("branches",) and value_at(given, location) is None


def _from_command_line(location: Location, overridden: Sequence[Location]) -> bool:
    return any(location[: len(path)] == path for path in overridden)
