from __future__ import annotations

import pytest

from thalweg.analysis.claims.judgement import DEFAULT_ROLES
from thalweg.analysis.figures.branch_style import (
    branch_label,
    branch_styles,
    group_label,
    group_styles,
    in_order,
    look_of,
)
from thalweg.analysis.figures.families import Group


def test_roles_have_fixed_colours_whatever_else_there_is() -> None:
    few = branch_styles(["trunk", "sgd", "dom-sgd", "bulk-sgd"], DEFAULT_ROLES)
    more = branch_styles(["frozen-bulk", "bulk-sgd", "sgd"], DEFAULT_ROLES)
    assert few["sgd"] == more["sgd"]
    assert few["bulk-sgd"] == more["bulk-sgd"]
    assert len({style.colour for style in few.values()}) == 4
    assert len({style.dash for name, style in few.items() if name != "trunk"}) == 3


@pytest.mark.parametrize("prefix", ["", "dom-", "bulk-"])
def test_a_dozen_branches_of_a_kind_are_told_apart(prefix: str) -> None:
    names = [f"{prefix}x{index}" for index in range(12)]
    roles = ("sgd", "dom-sgd", "bulk-sgd")
    styles = branch_styles([*roles, *names], DEFAULT_ROLES)
    assert len({look_of(style) for style in styles.values()}) == 15


def test_split_branches_have_the_colour_of_their_part_first() -> None:
    styles = branch_styles(["dom-sgd", "bulk-sgd", "dom-adam", "bulk-adam"], DEFAULT_ROLES)
    assert styles["dom-adam"].colour == styles["dom-sgd"].colour
    assert styles["bulk-adam"].colour == styles["bulk-sgd"].colour
    assert styles["dom-adam"].dash != styles["dom-sgd"].dash


def test_each_optimizer_looks_the_same_in_a_panel_of_its_own() -> None:
    looks = []
    for name in ("sgd", "adam"):
        members = (name, f"dom-{name}", f"bulk-{name}", f"bulk-{name}-frozen")
        styles = group_styles(Group(name, "", members), DEFAULT_ROLES)
        looks.append([look_of(style) for style in styles.values()])
        assert [style.label for style in styles.values()][1:] == ["Dom", "Bulk", "Bulk, frozen"]
    assert looks[0] == looks[1]


def test_a_variant_is_named_in_the_title_and_not_again() -> None:
    group = Group("sgd", "k15", ("sgd", "dom-k15", "bulk-sgd-k15"))
    assert group_label(group) == "SGD, k = 15"
    styles = group_styles(group, DEFAULT_ROLES)
    assert [style.label for style in styles.values()] == ["SGD", "Dom", "Bulk"]


def test_branches_are_shown_in_the_order_of_their_roles_and_of_their_numbers() -> None:
    names = ["x-200", "bulk-sgd", "trunk", "dom-sgd", "sgd", "x-5"]
    expected = ["trunk", "sgd", "dom-sgd", "bulk-sgd", "x-5", "x-200"]
    assert in_order(names, DEFAULT_ROLES) == expected


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("sgd", "SGD"),
        ("dom-sgd", "Dom-SGD"),
        ("bulk-adam", "Bulk-Adam"),
        ("dom-adam-frozen", "Dom-Adam, frozen"),
        ("bulk-rmsprop-own", "Bulk-RMSprop, own"),
        ("gd-large", "GD-large"),
        ("sam-gd", "SAM-GD"),
        ("sgd-batch-5", "SGD, batch 5"),
        ("dom-k15", "Dom, k = 15"),
        ("bulk-sgd-every-10", "Bulk-SGD, every 10"),
        ("noise-inside", "Noise inside"),
        ("trunk", "Trunk"),
    ],
)
def test_labels_are_written_as_in_the_literature(name: str, label: str) -> None:
    assert branch_label(name) == label
