"""What could be imported from `thalweg` before 0.2 still can, and a warning names the new home."""

from __future__ import annotations

import importlib

import pytest

import thalweg

FORMER = sorted(thalweg._FORMER_HOME)


@pytest.mark.parametrize("name", FORMER)
def test_a_former_name_is_handed_on_with_a_warning_that_names_its_home(name: str) -> None:
    with pytest.warns(DeprecationWarning, match=rf"from thalweg\.\w+ import {name}$") as caught:
        value = getattr(thalweg, name)
    home = str(caught[0].message).split("from ")[1].split(" import")[0]
    assert getattr(importlib.import_module(home), name) is value


@pytest.mark.parametrize("name", thalweg.__all__)
def test_a_name_of_the_top_level_comes_without_a_warning(name: str) -> None:
    assert callable(getattr(thalweg, name))


@pytest.mark.parametrize(
    ("package", "name"),
    [("curvature", "Hessian"), ("curvature", "BatchSubspace"), ("dynamics", "probe")],
)
def test_former_packages_hand_on_their_names(package: str, name: str) -> None:
    module = importlib.import_module(f"thalweg.{package}")
    with pytest.warns(DeprecationWarning, match=f"thalweg.{package}.{name} has moved"):
        assert callable(getattr(module, name))
    with pytest.raises(AttributeError, match="no attribute"):
        _ = module.nothing
