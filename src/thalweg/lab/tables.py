"""How is TOML read that may be hostile: nested without end, or made to be large in memory?

The reader of Python's library takes memory with the square of the dots in a key and recurses with
every bracket. So the text is looked over for both before it is read, and what was read is looked
over before anything is done with it.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from thalweg.errors import IntegrityError, InvalidInput, shown, without_controls
from thalweg.limits import check_limit, limit

_STRING_OR_COMMENT = re.compile(
    r'"""(?:[^\\]|\\.)*?"{3,5}|\'\'\'.*?\'{3,5}|"(?:[^"\\\n]++|\\.)*+"|\'[^\'\n]*\'|#[^\n]*',
    re.DOTALL,
)
_NOT_OF_A_KEY = re.compile(r"[=,\[\]{}\n]")
_BRACKET = re.compile(r"[\[\]{}]")
_INTEGERS = range(-(2**63), 2**63)
_LISTED = ("phases", "branches", "claims", "figures", "probes")


def parse_toml(text: str, source: str) -> dict[str, Any]:
    """The tables of a text in TOML; `source` is how messages call it.

    Raises:
        InvalidInput: it is no TOML (line and column are named), above a limit, or holds what no
            setting can be: see `check_tables`.
    """
    try:
        return parse_value(text, source)
    except tomllib.TOMLDecodeError as error:
        raise InvalidInput(f"{source}, {_syntax_error(error, text)}") from None


def parse_value(text: str, source: str) -> dict[str, Any]:
    """The same, where the caller has a use for text that is no TOML.

    Raises:
        tomllib.TOMLDecodeError: it is no TOML.
        InvalidInput: as `parse_toml`.
    """
    check_limit("spec_bytes", len(text), source)
    depth = _claimed_depth(text)
    check_limit("spec_depth", depth, source, f"{depth} levels of tables, arrays or dots of a key")
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        raise
    except (ValueError, OverflowError):  # of thousands of digits, or a date that there is not
        raise InvalidInput(
            f"{source}: holds a number or date that cannot be read; integers have 64 bits"
        ) from None
    except RecursionError:
        raise InvalidInput(f"{source}: nested too deeply") from None
    check_tables(raw, source)
    return raw


def stored_toml(text: str, path: Path) -> dict[str, Any]:
    """The tables of a file that Thalweg has written.

    Raises:
        IntegrityError: it is not what was written.
    """
    try:
        return parse_toml(text, str(path))
    except InvalidInput as error:
        hint = "restore it from a copy, or move the run away to make it anew"
        raise IntegrityError(f"{error}; {hint}") from None


def check_tables(raw: Any, source: str) -> None:
    """Refuse tables that are too deep or too many, and values that no setting can have.

    Raises:
        InvalidInput: above a limit, an integer beyond 64 bits, a key that is no text, or text with
            control characters (a line break or tab is none), which would reach a terminal.
    """
    waiting: list[tuple[Any, tuple[str, ...]]] = [(raw, ())]
    count = 0
    # Looked up once: the setting is parsed at each look.
    deepest, most = limit("spec_depth"), limit("spec_values")
    while waiting:
        value, path = waiting.pop()
        count += 1
        if isinstance(value, Mapping):
            _check_keys(value, path, source)
            waiting += [(item, (*path, key)) for key, item in value.items()]
        elif isinstance(value, list | tuple):
            waiting += [(item, (*path, str(number))) for number, item in enumerate(value)]
        else:
            _check_scalar(value, path, source)
        depth = len(path) - 1
        if depth > deepest:
            check_limit("spec_depth", depth, source, f"{depth} levels of tables or arrays")
        if count + len(waiting) > most:
            check_limit("spec_values", count + len(waiting), source)
    if isinstance(raw, Mapping):
        for name in _LISTED:
            listed = raw.get(name)
            number = len(listed) if isinstance(listed, Mapping | list | tuple) else 0
            check_limit("spec_entries", number, source, f"{number:,} {name}")


def _check_keys(table: Mapping[Any, Any], path: Sequence[str], source: str) -> None:
    for key in table:
        if not isinstance(key, str) or without_controls(key) != key or "\n" in key:
            place = f"{'.'.join(path)}: " if path else ""
            raise InvalidInput(
                f"{source}: {place}got the key {shown(key, 80)}, allowed: text without control"
                " characters"
            )


def _check_scalar(value: Any, path: Sequence[str], source: str) -> None:
    if isinstance(value, str) and without_controls(value) != value:
        place = ".".join(path)
        allowed = "text without control characters, in UTF-8"
        raise InvalidInput(f"{source}: {place}: got {shown(value, 80)}, allowed: {allowed}")
    if isinstance(value, int) and value not in _INTEGERS:
        place = ".".join(path)
        allowed = "an integer of 64 bits"
        raise InvalidInput(f"{source}: {place}: got {shown(value, 80)}, allowed: {allowed}")


def _claimed_depth(text: str) -> int:
    """Brackets inside of brackets, or dots in a key, whichever are more; never too few."""
    if not _BRACKET.search(text) and "." not in text:
        return 0
    plain = _STRING_OR_COMMENT.sub("_", text)
    dots = max(part.count(".") for part in _NOT_OF_A_KEY.split(plain))
    depth = deepest = 0
    for bracket in _BRACKET.findall(plain):
        depth = max(0, depth + (1 if bracket in "[{" else -1))
        deepest = max(deepest, depth)
    return max(dots, deepest)


def _syntax_error(error: tomllib.TOMLDecodeError, text: str) -> str:
    """Line, column and reason of a mistake in TOML."""
    found = re.match(r"(.*) \(at line (\d+), column (\d+)\)$", str(error), re.DOTALL)
    if found:
        return f"line {found[2]}, column {found[3]}: {found[1]}"
    lines = text.split("\n")
    reason = str(error).removesuffix(" (at end of document)")
    return f"line {len(lines)}, column {len(lines[-1]) + 1}: {reason}, at the end of the file"
