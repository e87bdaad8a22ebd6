"""What were keys of a spec called before? The former names are read for one version.

Hashes are made of them, so that the same settings stay in the same folder.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from thalweg.errors import invalid

FORMAT = 2
"""Version of the form in which specs are written; that of 0.1.0, without a number, is 1."""
FORMER = {"extends": "like", "starts_from": "after", "alignment_ema": "alignment_average"}
"""Former names of keys, by their name now."""
_OF_SPEC, _OF_PHASE, _OF_BRANCH = ("extends",), ("alignment_ema",), ("starts_from", "alignment_ema")


def with_present_keys(raw: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The tables of a spec with keys as they are called now; warns of each former one.

    Raises:
        InvalidInput: the spec is of a later format.
    """
    found = _renamed(raw, _OF_SPEC, source)
    written = found.pop("format", FORMAT)
    if isinstance(written, bool) or not isinstance(written, int) or not 1 <= written <= FORMAT:
        hint = "a later version of Thalweg reads later formats"
        raise invalid(f"{source}: format", written, f"1 to {FORMAT}", hint)
    phases, branches = found.get("phases"), found.get("branches")
    if isinstance(phases, list | tuple):
        found["phases"] = [_renamed(phase, _OF_PHASE, source) for phase in phases]
    if isinstance(branches, Mapping):
        found["branches"] = {
            name: _renamed(branch, _OF_BRANCH, source) for name, branch in branches.items()
        }
    return found


def present_path(path: str) -> str:
    """A key path of the command line with its key as it is called now; warns of a former one."""
    table, dot, key = path.rpartition(".")
    present = {former: now for now, former in FORMER.items()}.get(key.replace("-", "_"))
    of_phase = table.startswith(("phases.", "branches."))
    if present is None or not of_phase:
        return path
    _warn("command line", key, present)
    return f"{table}{dot}{present}"


def with_former_keys(table: Mapping[str, Any]) -> dict[str, Any]:
    """The table of a phase or branch with keys as they were called before, for hashes."""
    return {FORMER.get(key, key): value for key, value in table.items()}


def _renamed(table: Any, keys: tuple[str, ...], source: str) -> Any:
    if not isinstance(table, Mapping):
        return table
    present = {FORMER[key]: key for key in keys if FORMER[key] in table and key not in table}
    for former, key in present.items():
        _warn(source, former, key)
    return {present.get(key, key): value for key, value in table.items()}


def _warn(source: str, former: str, present: str) -> None:
    message = f"{source}: the key {former!r} is called {present!r} now"
    warnings.warn(message, DeprecationWarning, stacklevel=4)
