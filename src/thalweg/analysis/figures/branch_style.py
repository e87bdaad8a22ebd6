"""The look of a branch: one colour, one line style and one name in every figure and report.

Colours are those of Okabe and Ito (2008), told apart with the common colour-vision deficiencies;
the line styles differ too, so that a grey print still tells the branches apart.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from thalweg.analysis.figures.families import Group, part_of, tail_of

Dash = tuple[float, ...]


@dataclass(frozen=True)
class BranchStyle:
    """Look of one branch.

    colour, colour_on_dark  hexadecimal, for light and for dark backgrounds
    dash                    lengths of strokes and gaps in points; empty: a solid line
    """

    label: str
    colour: str
    colour_on_dark: str
    dash: Dash
    width: float = 1.3


_LOOKS: Mapping[str, tuple[str, str, Dash]] = {
    "trunk": ("#6b6b6b", "#a3a9b1", ()),
    "plain": ("#0072b2", "#56b4e9", ()),
    "dominant": ("#d55e00", "#ff9150", (4.0, 1.5)),
    "bulk": ("#009e73", "#2fd0a2", (6.0, 1.5, 1.2, 1.5)),
}
_DASHES: tuple[Dash, ...] = (
    (1.2, 1.2),
    (3.0, 1.2),
    (5.0, 1.2, 1.2, 1.2, 1.2, 1.2),
    (9.0, 2.0),
)
#: Colours on light and on dark of further branches: shades of a part's own, others for the unsplit.
_SHADES: Mapping[str | None, tuple[tuple[str, str], ...]] = {
    "dominant": (("#d55e00", "#ff9150"), ("#8c3a00", "#ffc49b"), ("#f08c4a", "#d9772f")),
    "bulk": (("#009e73", "#2fd0a2"), ("#00593f", "#a4ecd3"), ("#4cc7a2", "#1fa37e")),
    None: (
        ("#cc79a7", "#e79cc4"),
        ("#e69f00", "#f5bd45"),
        ("#56b4e9", "#9ad5f7"),
        ("#000000", "#f2f2f2"),
        ("#7a5195", "#b999d6"),
    ),
}
IN_ORDER: tuple[tuple[str, str], ...] = (
    ("#0d0887", "#8b88ff"),
    ("#7e03a8", "#c86be6"),
    ("#cc4778", "#ee7aa2"),
    ("#f89540", "#f89540"),
    ("#d3b400", "#f0e442"),
)
"""Colours on light and on dark of things that have an order, such as thresholds."""
_OPTIMIZERS = {
    **{name: name.upper() for name in ("sgd", "gd", "sam", "bsfa", "qsr")},
    **{name: name.capitalize() for name in ("adam", "muon", "momentum", "nesterov")},
    "adamw": "AdamW",
    "rmsprop": "RMSprop",
}
#: Settings that a name gives after the optimizer's; other words are a part of the optimizer's name.
_SETTINGS = (
    *("frozen", "own", "start", "exact", "random", "next", "subset", "every", "batch"),
    *("half", "fifth", "tenth", "twentieth", "fiftieth"),
)


def branch_label(name: str) -> str:
    """Name of a branch as written in the literature.

    Example:
        >>> [branch_label(name) for name in ("dom-sgd", "bulk-adam-frozen", "gd-large")]
        ['Dom-SGD', 'Bulk-Adam, frozen', 'GD-large']
    """
    words = name.split("-")
    split = len(words) > 1 and words[0] in ("dom", "bulk")
    count = next(
        (
            at
            for at, word in enumerate(words)
            if word not in _OPTIMIZERS and not (split and at == 0)
        ),
        len(words),
    )
    known = [_OPTIMIZERS.get(word, word.capitalize()) for word in words[:count]]
    rest = words[count:]
    if not known:
        text = " ".join(_OPTIMIZERS.get(word, word) for word in rest)
        return text[:1].upper() + text[1:]
    if not rest:
        return "-".join(known)
    if rest[0] in _SETTINGS or re.fullmatch(r"k\d+", rest[0]):
        return "-".join(known) + ", " + setting_label("-".join(rest))
    return "-".join([*known, *rest])


def setting_label(tail: str) -> str:
    """What a name adds to the optimizer's, as words: `k15` is `k = 15`."""
    return re.sub(r"\bk(\d+)\b", r"k = \1", tail.replace("-", " "))


def group_label(group: Group) -> str:
    """Title of a group of branches: its unsplit branch, or the variant it shows."""
    tail = [setting_label(group.tail)] if group.tail else []
    return ", ".join([branch_label(group.head), *tail])


def branch_styles(branches: Iterable[str], roles: Mapping[str, str]) -> dict[str, BranchStyle]:
    """Style of each branch: fixed for the roles and the trunk, taken in turn for all others.

    Branches of one part share its colour in a few shades; about 12 of each kind are told apart.
    """
    role_of = {name: role for role, name in roles.items()} | {"trunk": "trunk"}
    styles: dict[str, BranchStyle] = {}
    seen: Counter[str | None] = Counter()
    for branch in branches:
        if branch in role_of and role_of[branch] in _LOOKS:
            look = _LOOKS[role_of[branch]]
        else:
            part = part_of(branch, roles)
            look = _further_look(part, seen[part])
            seen[part] += 1
        styles[branch] = BranchStyle(branch_label(branch), *look)
    return styles


def _further_look(part: str | None, index: int) -> tuple[str, str, Dash]:
    """The index-th look: of a part all dashes of a shade first, else all colours of a dash."""
    shades = _SHADES[part]
    turn = index % (len(shades) * len(_DASHES))
    if part is None:
        return (*shades[turn % len(shades)], _DASHES[turn // len(shades)])
    return (*shades[turn // len(_DASHES)], _DASHES[turn % len(_DASHES)])


def group_styles(group: Group, roles: Mapping[str, str]) -> dict[str, BranchStyle]:
    """Styles within one group, as if its unsplit branch had the plain role, with short labels.

    The same variant looks the same in the panel of each optimizer.
    """
    of_part = {
        part: next((name for name in group.members if part_of(name, roles) == part), "")
        for part in ("dominant", "bulk")
    }
    styles = branch_styles(group.members, {"plain": group.head, **of_part})
    return {
        name: BranchStyle(_short_label(name, group, roles), *look_of(style))
        for name, style in styles.items()
    }


def look_of(style: BranchStyle) -> tuple[str, str, Dash]:
    """Colours and dash of a style."""
    return style.colour, style.colour_on_dark, style.dash


def _short_label(branch: str, group: Group, roles: Mapping[str, str]) -> str:
    """The label less what the title of the group says already."""
    if branch == group.head:
        return branch_label(branch)
    part = {"dominant": "Dom", "bulk": "Bulk", None: ""}[part_of(branch, roles)]
    tail = "" if group.tail else setting_label(tail_of(branch, group.head))
    return ", ".join(word for word in (part, tail) if word) or branch_label(branch)


def in_order(branches: Iterable[str], roles: Mapping[str, str]) -> list[str]:
    """Trunk first, then plain, dominant and bulk, then the others by name, 5 before 200."""
    first = ["trunk", *(roles[role] for role in ("plain", "dominant", "bulk") if role in roles)]
    rank = {name: place for place, name in enumerate(first)}
    return sorted(set(branches), key=lambda name: (rank.get(name, len(rank)), _natural(name)))


def _natural(name: str) -> list[tuple[int, str]]:
    """Order of a name in which numbers count as numbers."""
    return [
        (int(piece), "") if piece.isdigit() else (0, piece) for piece in re.split(r"(\d+)", name)
    ]
