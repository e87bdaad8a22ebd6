"""How large may be what is read? Every limit on a file, in one place.

A few bytes can claim gigabytes, and a small text can be nested so deeply that reading it takes
minutes. Each reader compares what a file claims with a limit before it parses or allocates. The
defaults are far above what the built-in problems need; docs/limits.md says why each is there.

One setting raises them, by name:

    THALWEG_LIMITS="array_bytes=8e9 spec_bytes=4e6" thalweg run my-spec.toml

Example:
    >>> limit("spec_depth")
    32
    >>> try:
    ...     check_limit("spec_depth", 40, "file deep.toml", "40 levels of tables")
    ... except InvalidInput as error:
    ...     print(str(error).partition("; ")[0])
    file deep.toml: found 40 levels of tables, allowed: at most 32
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from thalweg.errors import InvalidInput, ThalwegError, unknown_name

SETTING = "THALWEG_LIMITS"
"""The environment variable that holds other limits, as NAME=NUMBER with blanks between them."""


@dataclass(frozen=True)
class Limit:
    """One limit: its value, and what it is a limit on; `most` is as far as it can be raised."""

    value: int
    what: str
    most: int = 2**62


LIMITS: dict[str, Limit] = {
    "spec_bytes": Limit(2**20, "bytes of a spec, in TOML"),
    "spec_depth": Limit(32, "tables or arrays inside of one another, or dots in a key", 100),
    "spec_values": Limit(100_000, "values in a spec, with all overrides"),
    "spec_entries": Limit(1000, "phases, branches, claims, figures or probes of a spec"),
    "spec_chain": Limit(100, "branches that start from one another", 300),
    "sweep_points": Limit(100_000, "points of a sweep"),
    "json_bytes": Limit(16 * 2**20, "bytes of a JSON file of a study's folder"),
    "array_bytes": Limit(2**30, "bytes of the arrays in one file of data, unpacked"),
    "text_bytes": Limit(256 * 2**20, "bytes of one text, unpacked"),
    "archive_members": Limit(10_000, "files in a zip or tar"),
    "parameters_bytes": Limit(32 * 2**30, "bytes of the tensors in one file"),
    "table_bytes": Limit(4 * 2**30, "bytes of one Parquet file, unpacked"),
}
"""Every limit by its name."""


def limit(name: str) -> int:
    """The value of a limit, as `THALWEG_LIMITS` says or as it is by default.

    Raises:
        InvalidInput: the setting names no limit, or gives it no number that it can have.
    """
    return _given().get(name, LIMITS[name].value)


def check_limit(
    name: str,
    claimed: float,
    source: object,
    found: str = "",
    *,
    error: Callable[[str], ThalwegError] = InvalidInput,
) -> None:
    """Refuse what is above a limit, before it is read.

    Args:
        name: of the limit.
        claimed: how much there is, in the limit's unit.
        source: what messages call the file.
        found: the same in words; default: the number with its unit.
        error: the class of the error.

    Raises:
        InvalidInput: `claimed` is above the limit; another class where `error` is one.
    """
    allowed = limit(name)
    if claimed > allowed:
        what = found or f"{claimed:,} {LIMITS[name].what}"
        raise error(
            f"{source}: found {what}, allowed: at most {allowed:,}; if it is right and you trust"
            f" it, raise the limit: {SETTING}={name}={claimed:.0f}"
        )


def read_bytes(
    path: Path, name: str, *, error: Callable[[str], ThalwegError] = InvalidInput
) -> bytes:
    """A whole file of at most a limit's bytes, also one that grows or says a wrong size.

    Raises:
        InvalidInput: it is larger; another class where `error` is one.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        check_limit(name, os.fstat(file.fileno()).st_size, path, error=error)
        content = file.read(limit(name) + 1)
    check_limit(name, len(content), path, error=error)
    return content


def _given() -> dict[str, int]:
    """What the setting says, by name."""
    found: dict[str, int] = {}
    for word in os.environ.get(SETTING, "").replace(",", " ").split():
        name, _, value = word.partition("=")
        if name not in LIMITS:
            raise unknown_name(f"{SETTING}", name, LIMITS)
        try:
            number = float(value)
        except ValueError:
            number = 0.0
        if not 1 <= number <= LIMITS[name].most:
            allowed = f"a number from 1 to {LIMITS[name].most}"
            raise InvalidInput(f"{SETTING}: {name}: got {value[:40]!r}, allowed: {allowed}")
        found[name] = int(number)
    return found
