"""How is one spec laid over another? What the upper one says holds, the rest is the lower one's.

All inheritance in specs is this one rule, `laid_over`. It lays

1. a spec over the built-in one that it `extends`, and a study over the spec of its problem;
2. each branch over `[branches."*"]`;
3. each branch over the phase that it starts from: the trunk's last one, or another branch.

Tables are laid over each other key by key, arrays of tables (phases) entry by entry. A table that
names its choice, such as `{ name = "adam", lr = 0.001 }`, replaces the whole: the settings of one
optimizer mean nothing to another. "unset" leaves a key out. "off" in a branch leaves out what the
phase that it starts from has.

This is done with the tables as they were read, before anything is validated.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from thalweg.lab.config.overrides import UNSET

OFF = "off"
"""What a branch says of a key that the phase it starts from has, and it has not."""
CHOICES = ("data", "model", "loss", "optimizer", "schedule")
"""Keys of tables that name a choice."""
EVERY = "*"
"""What stands in the place of a branch's name for all of them."""
WHOLE = ("split", "noise", "local")
"""Tables that a branch has as its own or takes over whole: half a split is another method."""
OF_A_BRANCH_ALONE = ("name", "starts_from", "subspace", "probes")
NOT_TAKEN_OVER = (*OF_A_BRANCH_ALONE, "warmup_steps", "until_alignment", "until_loss")
"""Keys that a branch does not take over from the phase that it starts from."""
BOUNDS = ("steps", "epochs")
"""Either key bounds a phase: who gives one takes over none."""


def laid_over(lower: Any, upper: Any, whole: Collection[str] = ()) -> Any:
    """The two as one; neither is changed.

    Args:
        whole: keys of tables that replace the lower one's.

    Example:
        >>> laid_over({"lr": 0.1, "split": {"bulk": 0}, "steps": 9}, {"lr": 0.2, "steps": "unset"})
        {'lr': 0.2, 'split': {'bulk': 0}}
    """
    if isinstance(lower, Mapping) and isinstance(upper, Mapping):
        keys = [key for key in {**lower, **upper} if upper.get(key) != UNSET]
        return {key: _either(key, lower, upper, whole) for key in keys}
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


def with_full_branches(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The tables of a spec, each branch laid over the phase that it starts from.

    Example:
        >>> trunk = {"optimizer": {"name": "sgd", "lr": 0.1}, "clip_norm": 1.0, "steps": 9}
        >>> branches = {"fast": {"optimizer": {"lr": 0.2}, "clip_norm": "off"}}
        >>> with_full_branches({"phases": [trunk], "branches": branches})["branches"]["fast"]
        {'name': 'fast', 'optimizer': {'name': 'sgd', 'lr': 0.2}, 'steps': 9}
    """
    phases, branches = raw.get("phases"), raw.get("branches")
    if not (isinstance(phases, list | tuple) and phases and isinstance(branches, Mapping)):
        return dict(raw)
    full: dict[str, Any] = {}
    for name in _predecessors_first(branches):
        above = full.get(_starts_from(branches[name]) or "", phases[-1])
        full[name] = _full(name, branches[name], above, raw.get("subspace"))
    return {**raw, "branches": {name: full[name] for name in branches}}


def difference(lower: Mapping[str, Any], upper: Mapping[str, Any], absent: str) -> dict[str, Any]:
    """What has to be laid over the lower table to get the upper one.

    Args:
        absent: what says that a key is left out, "off" or "unset".
    """
    own = {key: value for key, value in upper.items() if lower.get(key) != value}
    bound = any(key in own for key in BOUNDS)
    gone = [key for key in lower if key not in upper and not (bound and key in BOUNDS)]
    return own | dict.fromkeys(gone, absent)


def taken_over(phase: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a phase's table that a branch takes over, where it says nothing itself."""
    return {key: value for key, value in phase.items() if key not in NOT_TAKEN_OVER}


def _full(name: str, branch: Any, above: Any, subspace: Any) -> Any:
    if not isinstance(branch, Mapping):
        return branch
    below = taken_over(above) if isinstance(above, Mapping) else {}
    if any(key in branch for key in BOUNDS):
        below = {key: value for key, value in below.items() if key not in BOUNDS}
    if isinstance(branch.get("subspace"), Mapping):
        below["subspace"] = subspace or {}
    both = laid_over(below, branch, WHOLE)
    return {"name": name, **{key: value for key, value in both.items() if value != OFF}}


def _starts_from(branch: Any) -> str | None:
    given = branch.get("starts_from") if isinstance(branch, Mapping) else None
    return given if isinstance(given, str) else None


def _predecessors_first(branches: Mapping[str, Any]) -> list[str]:
    """The names in an order in which each comes after the branch it starts from.

    Those in a circle, or after a branch that does not exist, anywhere: the spec's own check refuses
    them.
    """
    before = {name: _starts_from(branch) for name, branch in branches.items()}
    order: dict[str, None] = {}
    for name in before:
        chain: dict[str, None] = {}
        here: str | None = name
        while here in before and here not in order and here not in chain:
            chain[here] = None
            here = before[here]
        order.update(dict.fromkeys(reversed(chain)))
    return list(order)


def _either(
    key: str, lower: Mapping[str, Any], upper: Mapping[str, Any], whole: Collection[str]
) -> Any:
    if key not in upper:
        return lower[key]
    above, below = upper[key], lower.get(key)
    if key in whole:
        return above
    if key in CHOICES:
        if isinstance(above, Mapping) and "name" in above:
            return above
        below = {"name": below} if isinstance(below, str) else below
    return laid_over(below, above)


def _are_tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, Mapping) for v in value)
