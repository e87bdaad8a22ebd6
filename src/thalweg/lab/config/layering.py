"""How is one spec laid over another? What the upper one says holds, the rest is the lower one's.

Tables are laid over each other key by key, arrays of tables (phases) entry by entry. A table that
names its choice, such as `{ name = "adam", lr = 0.001 }`, replaces the whole: the settings of one
optimizer mean nothing to another. "unset" leaves a key out.

The table `[branches."*"]` is laid under every branch in this way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from thalweg.lab.config.overrides import UNSET

CHOICES = ("data", "model", "loss", "optimizer", "schedule")
"""Keys of tables that name a choice."""
EVERY = "*"
"""What stands in the place of a branch's name for all of them."""


def laid_over(lower: Any, upper: Any) -> Any:
    """The two as one; neither is changed."""
    if isinstance(lower, Mapping) and isinstance(upper, Mapping):
        keys = [key for key in {**lower, **upper} if upper.get(key) != UNSET]
        return {key: _either(key, lower, upper) for key in keys}
    if _are_tables(lower) and _are_tables(upper):
        below = [lower[min(n, len(lower) - 1)] for n in range(len(upper))]
        return [laid_over(*pair) for pair in zip(below, upper, strict=True)]
    return upper


def with_common_branch(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The tables of a spec, its `[branches."*"]` laid under every branch and gone itself.

    Example:
        >>> with_common_branch({"branches": {"*": {"steps": 9}, "a": {}, "b": {"steps": 3}}})
        {'branches': {'a': {'steps': 9}, 'b': {'steps': 3}}}
    """
    branches = raw.get("branches")
    if not (isinstance(branches, Mapping) and isinstance(branches.get(EVERY), Mapping)):
        return raw
    common = branches[EVERY]
    own = {name: branch for name, branch in branches.items() if name != EVERY}
    return {**raw, "branches": {name: laid_over(common, branch) for name, branch in own.items()}}


def _either(key: str, lower: Mapping[str, Any], upper: Mapping[str, Any]) -> Any:
    if key not in upper:
        return lower[key]
    above = upper[key]
    is_other_choice = key in CHOICES and isinstance(above, Mapping) and "name" in above
    return above if is_other_choice else laid_over(lower.get(key), above)


def _are_tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, Mapping) for v in value)
