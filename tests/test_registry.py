"""What is registered under a name is there once, in order, and found or refused by it."""

from __future__ import annotations

import pytest

from thalweg import registry
from thalweg.errors import InvalidInput
from thalweg.registry import Registry, register


def test_entries_are_kept_in_the_order_in_which_they_came() -> None:
    colours: Registry[int] = Registry("colour")
    assert colours.add("red", 1) == 1
    colours.register("blue")(2)
    assert list(colours) == ["red", "blue"]
    assert colours.names() == ("blue", "red")
    assert (colours.find("blue"), colours["red"], len(colours)) == (2, 1, 2)


def test_a_taken_name_and_an_unknown_one_are_refused_by_kind() -> None:
    colours: Registry[int] = Registry("colour")
    colours.add("red", 1)
    with pytest.raises(InvalidInput, match=r"colour name: got 'red', .* not used yet"):
        colours.add("red", 2)
    with pytest.raises(InvalidInput, match=r"colour: got 'rad', .* did you mean 'red'"):
        colours.find("rad")


@pytest.mark.parametrize("name", ["", ".hidden", "../up", "a/b", "a b", "red\n"])
def test_a_name_that_leaves_its_folder_is_refused(name: str) -> None:
    with pytest.raises(InvalidInput, match="name of a colour"):
        Registry("colour").add(name, 1)


@pytest.mark.parametrize("kind", dir(register))
def test_no_name_of_a_built_in_entry_can_be_taken(kind: str) -> None:
    kinds = {"data": "datasets", "loss": "losses", "study": "studies"}
    entries = getattr(registry, kinds.get(kind, kind + "s"))
    for name in entries:
        with pytest.raises(InvalidInput, match="not used yet"):
            getattr(register, kind)(name)(object)


def test_a_kind_that_is_not_registered_is_told() -> None:
    with pytest.raises(AttributeError, match=r"register\.optimiser: allowed: data, model, "):
        register.optimiser("lion")
