"""Families of branches: an optimizer, its Dom- and Bulk- branches, and their variants.

Read from the names: `dom-adam-frozen` is the dominant branch of `adam`, with a frozen basis. A name
whose stem is no branch of the study (`dom-random`) belongs to the plain branch.

Example:
    >>> names = ["sgd", "adam", "dom-adam", "bulk-adam-frozen", "bulk-random"]
    >>> [base_of(name, names, {"plain": "sgd"}) for name in names]
    [None, None, 'adam', 'adam', 'sgd']
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

Part = Literal["dominant", "bulk"]

_PREFIXES: Mapping[str, Part] = {"dom": "dominant", "bulk": "bulk"}
#: An unsplit branch with one of these at its end is another stage of the branch without, or the
#: same measured on other subspaces.
_SUFFIXES = ("frozen", "own", "start", "random", "next")
#: More branches than this are not told apart in one panel; a whole family may have some more.
MOST_TOGETHER, MOST_OF_FAMILY = 8, 10


@dataclass(frozen=True)
class Group:
    """Branches shown together: `head` is the unsplit one, `tail` what its members' names add."""

    head: str
    tail: str
    members: tuple[str, ...]


def part_of(branch: str, roles: Mapping[str, str]) -> Part | None:
    """The part of the update that a branch keeps, by its role or name; None: it is not split."""
    for part in ("dominant", "bulk"):
        if roles.get(part) == branch:
            return part
    return _PREFIXES.get(branch.partition("-")[0]) if "-" in branch else None


def unsplit(branches: Iterable[str], roles: Mapping[str, str]) -> list[str]:
    """The branches that make the optimizer's whole step, the trunk apart."""
    return [name for name in branches if name != "trunk" and part_of(name, roles) is None]


def base_of(branch: str, branches: Collection[str], roles: Mapping[str, str]) -> str | None:
    """The unsplit branch that a branch is compared with.

    None for the trunk, for an unsplit branch that others are split from, and where there is none.
    """
    heads = _heads(branches, roles)
    plain = roles.get("plain")
    fallback = plain if plain in branches and plain != branch else None
    if branch == "trunk":
        return None
    if part_of(branch, roles) is not None:
        return _stem(branch, heads) or fallback
    if branch not in heads:
        return branch.rpartition("-")[0]
    split = [name for name in branches if part_of(name, roles) is not None]
    return None if any(_stem(name, heads) == branch for name in split) else fallback


def in_groups(branches: Collection[str], roles: Mapping[str, str]) -> list[Group]:
    """The branches in groups of at most `MOST_OF_FAMILY`, the trunk left out.

    A group is a family: an unsplit branch and those compared with it. A larger family falls into
    its variants, each with the unsplit branch again.
    """
    families: dict[str, list[str]] = {}
    for branch in branches:
        if branch != "trunk":
            families.setdefault(base_of(branch, branches, roles) or branch, []).append(branch)
    groups: list[Group] = []
    for head, members in families.items():
        ordered = sorted(members, key=lambda name: name != head)
        if len(ordered) <= MOST_OF_FAMILY:
            groups.append(Group(head, "", tuple(ordered)))
            continue
        variants: dict[str, list[str]] = {}
        for member in ordered:
            variants.setdefault(tail_of(member, head), []).append(member)
        groups += [
            Group(head, tail, tuple(dict.fromkeys([head, *names])))
            for tail, names in variants.items()
            if tail or len(names) > 1
        ]
    return groups


def tail_of(branch: str, head: str) -> str:
    """What a name adds to its part and its unsplit branch: `frozen` of `dom-adam-frozen`."""
    words = _without_prefix(branch).split("-")
    first = head.split("-")
    return "-".join(words[len(first) :] if words[: len(first)] == first else words)


def _heads(branches: Iterable[str], roles: Mapping[str, str]) -> list[str]:
    """The unsplit branches that are no stage of another one."""
    whole = unsplit(branches, roles)
    parts = {name: name.rpartition("-") for name in whole}
    return [n for n, (stem, _, end) in parts.items() if not (end in _SUFFIXES and stem in whole)]


def _stem(branch: str, heads: Collection[str]) -> str | None:
    """The longest of the heads with whose name a branch's begins, its prefix apart."""
    words = _without_prefix(branch).split("-")
    stems = ("-".join(words[:count]) for count in range(len(words), 0, -1))
    return next((stem for stem in stems if stem in heads), None)


def _without_prefix(branch: str) -> str:
    prefix, _, rest = branch.partition("-")
    return rest if rest and prefix in _PREFIXES else branch
