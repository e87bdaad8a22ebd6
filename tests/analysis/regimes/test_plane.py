"""Which settings span a picture, and what is each point's value there?"""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.analysis.regimes.sweeps import fill, grid, sweep_of, write_run
from thalweg.analysis.claims.interval import seed_interval
from thalweg.analysis.regimes.plane import (
    Axis,
    panels_in_a_row,
    plane_of,
    setting_text,
    statistic_of_points,
    varying,
)
from thalweg.analysis.regimes.table import read_table
from thalweg.errors import InvalidInput

NOWHERE = Path("nowhere")
THREE = grid(lr=[0.1, 0.01, 0.001], batch_size=["all", 50], width=[32, 64], loss=["mse"])


def test_the_two_settings_with_the_most_values_are_the_axes() -> None:
    plane = plane_of(sweep_of(NOWHERE, grid(width=[1, 2], lr=[1, 2, 3], batch=[1, 2, 3, 4])))
    assert plane.horizontal
    assert plane.vertical
    assert (plane.horizontal.key, plane.vertical.key) == ("batch", "lr")
    assert [axis.key for axis in plane.others] == ["width"]
    assert [panel.title for panel in plane.panels] == ["width = 1", "width = 2"]
    assert plane.is_grid


def test_axes_can_be_named_and_all_others_are_panels() -> None:
    plane = plane_of(sweep_of(NOWHERE, THREE), ["width", "lr"])
    assert plane.horizontal
    assert plane.vertical
    assert (plane.horizontal.key, plane.vertical.key) == ("width", "lr")
    assert [panel.title for panel in plane.panels] == ["batch_size = 50", "batch_size = all"]
    one = plane_of(sweep_of(NOWHERE, THREE), ["lr"])
    assert one.vertical is None
    assert len(one.panels) == 4


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["lrr", "width"], "did you mean 'lr'"),
        (["lr", "loss"], "a setting that differs between points"),
        (["lr", "lr"], "two different ones"),
        (["lr", "width", "batch_size"], "two different ones"),
        ([], "one setting"),
        ("lr", "a list of one setting"),
    ],
)
def test_axes_that_cannot_be_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        plane_of(sweep_of(NOWHERE, THREE), names)


def test_values_stand_by_size_and_words_after_them() -> None:
    axes = {axis.key: axis for axis in varying(sweep_of(NOWHERE, THREE))}
    assert axes["lr"].values == (0.001, 0.01, 0.1)
    assert axes["batch_size"].values == (50, "all")
    assert axes["lr"].logarithmic
    assert not axes["batch_size"].numerical
    unset = varying(sweep_of(NOWHERE, [{"lr": 0.1}, {}, {"lr": True}]))[0]
    assert unset.texts == ("0.1", "–", "true")


def test_one_number_written_in_two_ways_is_one_value() -> None:
    (axis,) = varying(sweep_of(NOWHERE, [{"lr": 1}, {"lr": 1.0}, {"lr": 2.0}]))
    assert axis.texts == ("1", "2")


def test_labels_are_short_where_that_tells_them_apart() -> None:
    assert Axis("lr", (0.123456, 0.2)).labels == ("0.123", "0.2")
    assert Axis("lr", (0.123456, 0.123457)).labels == ("0.123456", "0.123457")
    assert Axis("name", ("x" * 100,)).labels == ("x" * 23 + "…",)
    assert setting_text([1, "a"]) == '[1, "a"]'


def test_points_in_less_than_half_of_the_cells_are_a_scatter() -> None:
    random = [{"lr": 0.1 * n, "width": n * n % 17} for n in range(1, 12)]
    assert not plane_of(sweep_of(NOWHERE, random)).is_grid
    assert plane_of(sweep_of(NOWHERE, THREE[:-3])).is_grid


def test_two_points_in_one_cell_are_a_scatter() -> None:
    assert not plane_of(sweep_of(NOWHERE, [*grid(a=[1, 2], b=[1, 2]), {"a": 1, "b": 1}])).is_grid


def test_small_multiples_of_two_settings_are_a_matrix() -> None:
    width, optimizer = Axis("width", (1, 2, 3)), Axis("optimizer", ("sgd", "adam"))
    assert panels_in_a_row(6, [width, optimizer], 4) == 2
    assert panels_in_a_row(6, [width], 4) == 3
    assert panels_in_a_row(2, [optimizer], 4) == 2
    assert panels_in_a_row(5, [width], 3) == 3


def test_a_value_is_the_mean_over_the_seeds_that_are_done(quick_path: Path) -> None:
    sweep = sweep_of(quick_path, [{"lr": 1}, {"lr": 2}, {"lr": 3}], seeds=(0, 1, 2))
    losses = {0: [1.0, 2.0, 4.0], 1: [1.0, 2.0, math.inf], 2: [1.0, math.nan, math.nan]}
    states = {0: ["done"] * 3, 1: ["done", "done", "diverged"], 2: ["done", "failed", "diverged"]}
    for number, point in enumerate(sweep.points):
        for seed in sweep.seeds:
            loss = {"loss": [losses[number][seed]], "test_accuracy": [0.5]}
            write_run(point.study, seed, "sgd", loss, states[number][seed])
    table = read_table(sweep)
    rows = statistic_of_points(table, "loss", "sgd").to_dict("records")
    logs = seed_interval([math.log(loss) for loss in losses[0]])
    assert rows[0]["mean"] == pytest.approx(2.0)
    assert (rows[0]["low"], rows[0]["high"]) == pytest.approx(
        (math.exp(logs.low), math.exp(logs.high))
    )
    # Of two seeds the range.
    assert [rows[1][name] for name in ("low", "high", "seeds", "diverged")] == [1.0, 2.0, 2, 1]
    assert [rows[2][name] for name in ("seeds", "diverged", "unfinished")] == [1, 1, 1]
    accuracy = statistic_of_points(table, "test_accuracy", "sgd")
    assert accuracy["mean"].tolist() == [50.0] * 3
    assert statistic_of_points(table, "sharpness", "sgd")["mean"].isna().all()
    assert statistic_of_points(table, "loss", "nowhere")["seeds"].tolist() == [0] * 3


def test_every_point_has_a_row_also_where_the_branch_is_missing(quick_path: Path) -> None:
    sweep = fill(sweep_of(quick_path, THREE[:4], seeds=(0,)), branches=("sgd",))
    rows = statistic_of_points(read_table(sweep), "loss", "bulk-sgd")
    assert rows["lr"].tolist() == [0.1] * 4
    assert rows["mean"].isna().all()
