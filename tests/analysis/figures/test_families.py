from __future__ import annotations

import pytest

from thalweg.analysis.figures.families import base_of, in_groups, part_of, tail_of, unsplit

OPTIMIZERS = [
    "trunk",
    *("sgd", "dom-sgd", "bulk-sgd"),
    *("adam", "adam-start", "dom-adam", "bulk-adam-frozen", "dom-adam-own"),
    *("adamw", "bulk-adamw"),
]
ROLES = {"plain": "sgd", "dominant": "dom-sgd", "bulk": "bulk-sgd"}


@pytest.mark.parametrize(
    ("branch", "base"),
    [
        ("trunk", None),
        ("sgd", None),
        ("dom-sgd", "sgd"),
        ("adam", None),
        ("adam-start", "adam"),
        ("bulk-adam-frozen", "adam"),
        ("dom-adam-own", "adam"),
        ("bulk-adamw", "adamw"),
    ],
)
def test_a_branch_is_compared_with_the_unsplit_one_of_its_optimizer(
    branch: str, base: str | None
) -> None:
    assert base_of(branch, OPTIMIZERS, ROLES) == base


def test_a_branch_without_its_own_optimizer_is_compared_with_the_plain_one() -> None:
    names = ["sgd", "gd", "sgd-batch-5", "dom-random", "bulk-k15"]
    assert [base_of(name, names, ROLES) for name in names] == [None, "sgd", "sgd", "sgd", "sgd"]
    assert base_of("bulk-k15", ["bulk-k15"], ROLES) is None


def test_an_unsplit_branch_measured_on_other_subspaces_leads_no_family() -> None:
    names = ["sgd", "sgd-random", "dom-sgd-random", "gd", "gd-large", "bulk-gd-large"]
    bases = [base_of(name, names, ROLES) for name in names]
    assert bases == [None, "sgd", "sgd", "sgd", None, "gd-large"]


def test_parts_come_from_roles_and_names() -> None:
    roles = {"dominant": "along", "bulk": "across"}
    parts = [
        part_of(name, roles) for name in ("along", "across", "dom-x", "bulk-x", "bulk", "dome")
    ]
    assert parts == ["dominant", "bulk", "dominant", "bulk", None, None]
    assert unsplit(OPTIMIZERS, ROLES) == ["sgd", "adam", "adam-start", "adamw"]


def test_families_are_groups_led_by_their_unsplit_branch() -> None:
    groups = {group.head: group.members for group in in_groups(OPTIMIZERS, ROLES)}
    assert groups == {
        "sgd": ("sgd", "dom-sgd", "bulk-sgd"),
        "adam": ("adam", "adam-start", "dom-adam", "bulk-adam-frozen", "dom-adam-own"),
        "adamw": ("adamw", "bulk-adamw"),
    }


def test_a_large_family_falls_into_its_variants_each_beside_the_unsplit_branch() -> None:
    tails = ["k15", "random", "every-10", "every-100", "exact"]
    names = ["sgd", "dom-sgd", *(f"{part}-{tail}" for tail in tails for part in ("dom", "bulk"))]
    groups = {group.tail: group.members for group in in_groups(names, ROLES)}
    assert groups["every-10"] == ("sgd", "dom-every-10", "bulk-every-10")
    assert groups[""] == ("sgd", "dom-sgd")
    assert list(groups) == ["", *tails]


@pytest.mark.parametrize(
    ("branch", "tail"),
    [("sgd", ""), ("dom-sgd", ""), ("dom-sgd-every-10", "every-10"), ("bulk-k15", "k15")],
)
def test_a_tail_is_what_the_name_adds(branch: str, tail: str) -> None:
    assert tail_of(branch, "sgd") == tail
