"""How does a branch look: one colour, one line style and one name in every figure and report.

Colours are those of Okabe and Ito (2008), told apart with the common colour-vision deficiencies;
the line styles differ too, so that a grey print still tells the branches apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class BranchStyle:
    """Look of one branch.

    colour, colour_on_dark  hexadecimal, for light and for dark backgrounds
    dash                    lengths of strokes and gaps in points; empty: a solid line
    """

    label: str
    colour: str
    colour_on_dark: str
    dash: tuple[float, ...]
    width: float = 1.3


_LOOKS: Mapping[str, tuple[str, str, tuple[float, ...]]] = {
    "trunk": ("#6b6b6b", "#a3a9b1", ()),
    "plain": ("#0072b2", "#56b4e9", ()),
    "dominant": ("#d55e00", "#ff9150", (4.0, 1.5)),
    "bulk": ("#009e73", "#2fd0a2", (6.0, 1.5, 1.2, 1.5)),
}
_FURTHER = (
    ("#cc79a7", "#e79cc4", (1.2, 1.2)),
    ("#e69f00", "#f5bd45", (3.0, 1.2)),
    ("#56b4e9", "#9ad5f7", (5.0, 1.2, 1.2, 1.2, 1.2, 1.2)),
    ("#000000", "#f2f2f2", (2.0, 1.0)),
)
_ACRONYMS = {"sgd", "gd", "sam", "bsfa", "qsr"}


def branch_label(name: str) -> str:
    """Name of a branch as written in the literature: `dom-sgd` becomes `Dom-SGD`."""
    parts = name.split("-")
    return "-".join(
        part.upper() if part in _ACRONYMS else part[:1].upper() + part[1:] for part in parts
    )


def branch_styles(branches: Iterable[str], roles: Mapping[str, str]) -> dict[str, BranchStyle]:
    """Style of each branch: fixed for the roles and the trunk, taken in turn for all others."""
    role_of = {name: role for role, name in roles.items()} | {"trunk": "trunk"}
    styles: dict[str, BranchStyle] = {}
    further = 0
    for branch in branches:
        if branch in role_of and role_of[branch] in _LOOKS:
            look = _LOOKS[role_of[branch]]
        else:
            look = _FURTHER[further % len(_FURTHER)]
            further += 1
        styles[branch] = BranchStyle(branch_label(branch), *look)
    return styles


def in_order(branches: Iterable[str], roles: Mapping[str, str]) -> list[str]:
    """Trunk first, then plain, dominant and bulk, then the others by name."""
    first = ["trunk", *(roles[role] for role in ("plain", "dominant", "bulk") if role in roles)]
    rank = {name: place for place, name in enumerate(first)}
    return sorted(set(branches), key=lambda name: (rank.get(name, len(rank)), name))
