"""What could be imported from `thalweg` before 0.2 still can, and a warning names the new home."""

from __future__ import annotations

import importlib

import pytest

import thalweg

FORMER = sorted(thalweg._FORMER_HOME)


@pytest.mark.parametrize("name", FORMER)
def test_a_former_name_is_handed_on_with_a_warning_that_names_its_home(name: str) -> None:
    with pytest.warns(DeprecationWarning, match=r"from thalweg\.\w+ import \w+$") as caught:
        value = getattr(thalweg, name)
    home, new_name = str(caught[0].message).split("from ")[1].split(" import ")
    assert getattr(importlib.import_module(home), new_name) is value


@pytest.mark.parametrize("name", thalweg.__all__)
def test_a_name_of_the_top_level_comes_without_a_warning(name: str) -> None:
    assert callable(getattr(thalweg, name))


@pytest.mark.parametrize(
    ("package", "name"),
    [
        ("curvature", "Hessian"),
        ("curvature", "BatchSubspace"),
        ("dynamics", "probe"),
        ("dynamics", "Moment"),
    ],
)
def test_former_packages_hand_on_their_names(package: str, name: str) -> None:
    module = importlib.import_module(f"thalweg.{package}")
    with pytest.warns(DeprecationWarning, match=f"thalweg.{package}.{name} has moved"):
        assert callable(getattr(module, name))
    with pytest.raises(AttributeError, match="no attribute"):
        _ = module.nothing


def test_the_state_of_a_step_can_be_imported_by_its_former_name() -> None:
    from thalweg import measure

    with pytest.warns(DeprecationWarning, match="now called StepState"):
        assert measure.Moment is measure.StepState
    with pytest.raises(AttributeError, match="no attribute"):
        _ = measure.nothing
