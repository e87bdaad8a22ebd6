"""What is registered under a name is there once, in order, and found or refused by it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from thalweg.errors import InvalidInput
from thalweg.named import Named


@dataclass(frozen=True)
class Colour:
    name: str


def test_entries_are_kept_in_the_order_in_which_they_came() -> None:
    colours: Named[Colour] = Named("colour")
    red, blue = (Colour(name) for name in ("red", "blue"))
    assert colours.add(red) is red
    colours.add(blue)
    assert list(colours) == ["red", "blue"]
    assert colours.find("blue") is blue


def test_a_taken_name_and_an_unknown_one_are_refused_by_kind() -> None:
    colours: Named[Colour] = Named("colour")
    colours.add(Colour("red"))
    with pytest.raises(InvalidInput, match=r"colour name: got 'red', .* not used yet"):
        colours.add(Colour("red"))
    with pytest.raises(InvalidInput, match=r"colour: got 'rad', .* did you mean 'red'"):
        colours.find("rad")
