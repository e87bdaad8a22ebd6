"""Axes: from words, from a table, and how they are combined."""

from __future__ import annotations

import itertools
import math
from datetime import date
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thalweg.errors import InvalidInput
from thalweg.lab.sweeps.axes import Axes, Range, axes_from_table, axes_from_words, joined

VALUES = st.dictionaries(
    st.sampled_from(["lr", "k", "batch_size", "samples"]),
    st.lists(st.integers(1, 99), min_size=1, max_size=4, unique=True),
    min_size=1,
    max_size=3,
)


@given(grid=VALUES)
def test_a_grid_is_every_combination_once(grid: dict[str, list[Any]]) -> None:
    points = Axes(grid=grid).settings()
    expected = [dict(zip(grid, row, strict=True)) for row in itertools.product(*grid.values())]
    assert points == expected


def test_words_are_values_of_toml_or_text() -> None:
    axes = axes_from_words(["lr=1e-3,0.1", "batch_size=10,all", "problem.model.hidden=[8,8],[9]"])
    assert axes.grid == {
        "lr": [1e-3, 0.1],
        "batch_size": [10, "all"],
        "problem.model.hidden": [[8, 8], [9]],
    }


def test_a_zip_goes_side_by_side_and_is_combined_with_the_grid() -> None:
    axes = axes_from_words(["k=1,2"], ["lr=0.1,0.2", "batch_size=10,20"])
    assert axes.settings() == [
        {"lr": 0.1, "batch_size": 10, "k": 1},
        {"lr": 0.1, "batch_size": 10, "k": 2},
        {"lr": 0.2, "batch_size": 20, "k": 1},
        {"lr": 0.2, "batch_size": 20, "k": 2},
    ]


def test_log_values_have_equal_ratios_and_few_digits() -> None:
    values = axes_from_words(["lr=log:0.001:1:7"]).grid["lr"]
    assert values == [0.001, 0.00316228, 0.01, 0.0316228, 0.1, 0.316228, 1.0]
    assert axes_from_words(["lr=linear:0:1:5"]).grid["lr"] == [0.0, 0.25, 0.5, 0.75, 1.0]
    whole = {"linear:10:50:5": [10, 20, 30, 40, 50], "log:1:1000:4": [1, 10, 100, 1000]}
    for words, expected in whole.items():
        values = axes_from_words([f"batch_size={words}"]).grid["batch_size"]
        assert values == expected
        assert {type(value) for value in values} == {int}


@given(low=st.floats(1e-6, 1), ratio=st.floats(1.1, 1e6), place=st.floats(0, 1))
def test_a_log_range_stays_between_its_ends(low: float, ratio: float, place: float) -> None:
    value = Range(low, low * ratio, "log").at(place)
    assert low * (1 - 1e-5) <= value <= low * ratio * (1 + 1e-5)


def test_what_is_drawn_is_the_same_from_one_seed() -> None:
    def drawn(seed: int) -> list[dict[str, Any]]:
        words = ["lr=log:0.001:1", "optimizer.name=sgd,adam"]
        return axes_from_words(drawn=words, draws=20, seed=seed).settings()

    assert drawn(3) == drawn(3) != drawn(4)
    assert len(drawn(3)) == 20
    assert {point["optimizer.name"] for point in drawn(3)} == {"sgd", "adam"}
    middle = sum(math.log10(point["lr"]) for point in drawn(3)) / 20
    assert -2.2 < middle < -0.8


def test_a_table_says_the_same_as_words() -> None:
    table = {
        "grid": {"lr": {"low": 0.001, "high": 1.0, "points": 4, "scale": "log"}},
        "zip": {"problem": {"model": {"width": [8, 16]}}, "k": [1, 2]},
        "list": [{"phases": {"0": {"batch_size": 5}}}, {"phases.0.batch_size": 6}],
    }
    axes = axes_from_table(table, "file")
    assert axes.grid == {"lr": [0.001, 0.01, 0.1, 1.0]}
    assert axes.zip == {"problem.model.width": [8, 16], "k": [1, 2]}
    assert len(axes.settings()) == 16


def test_the_command_line_replaces_an_axis_of_the_file() -> None:
    file = Axes(grid={"lr": [1, 2], "k": [3]}, list=[{"lr": 5}])
    axes = joined(file, axes_from_words(["lr=7,8"]))
    assert axes.grid == {"k": [3], "lr": [7, 8]}
    assert not axes.list


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"grid": ["lr"]}, "--grid: got 'lr', allowed: KEY=VALUE"),
        ({"grid": ["lr=0.1,,0.2"]}, "--grid lr: got '', allowed: values"),
        ({"grid": ["lr=0.1", "lr=0.2"]}, "lr once"),
        ({"grid": ["lr=log:0:1:3"]}, "above zero"),
        ({"grid": ["lr=log:1:0.1:3"]}, "a low end below the high one"),
        ({"grid": ["lr=log:0.1:1"]}, "log:LOW:HIGH:COUNT"),
        ({"grid": ["lr=log:0.1:1:1"]}, "an integer >= 2"),
        ({"grid": ["lr=log:a:1:3"]}, "range: low: got 'a', allowed: a number"),
        ({"grid": ["lr=linear:0:inf:3"]}, "a finite number"),
        ({"grid": ["lr=log:0.1:1:9999999"]}, "at most 100,000"),
        ({"zipped": ["lr=1,2", "k=1"]}, "zip: got '2 of lr, 1 of k'"),
        ({"grid": ["lr=1"], "zipped": ["lr=1"]}, "each key in one of"),
        ({"drawn": ["lr=log:0.1:1"]}, "--draws N"),
        ({"draws": 3}, "--draws: nothing is drawn"),
        ({"drawn": ["lr=log:0.1:1:5"], "draws": 3}, "log:LOW:HIGH, such as"),
    ],
)
def test_words_that_are_no_axis_are_refused(words: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        axes_from_words(**words).settings()
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ([], "sweep: got"),
        ({"gird": {}}, "gird"),
        ({"grid": []}, "sweep.grid"),
        ({"grid": {"lr": 0.1}}, "sweep.grid.lr"),
        ({"grid": {"lr": {"low": 0.1, "high": 1.0}}}, "range: points"),
        ({"grid": {"lr": {"low": 0.1, "high": 1.0, "points": "x"}}}, "range: points: got 'x'"),
        ({"grid": {"lr": {"low": 0.1, "high": 1.0, "points": 2.5}}}, "range: points: got 2.5"),
        ({"grid": {"lr": {"low": 0.1, "high": 1.0, "points": 10**9}}}, "at most 100,000"),
        ({"grid": {"lr": [date(2024, 1, 1)]}}, "values of lr"),
        ({"list": [{"lr": date(2024, 1, 1)}]}, "values of lr"),
        ({"random": {"lr": []}}, "values of lr: got 'none'"),
        ({"list": [1]}, "sweep.list"),
        ({"random": {"lr": [1]}, "draws": "x"}, "sweep.draws"),
        ({"grid": {"lr": [1] * 400, "k": [1] * 400}}, ""),
    ],
)
def test_tables_that_are_no_axes_are_refused(table: Any, says: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        axes_from_table(table, "file").settings()
    assert says in str(refused.value)


@pytest.mark.parametrize("values", ["sgd", 0.1, [], [object()]])
def test_values_in_python_that_are_no_list_are_refused(values: Any) -> None:
    with pytest.raises(InvalidInput, match="values of lr"):
        Axes(grid={"lr": values}).settings()
