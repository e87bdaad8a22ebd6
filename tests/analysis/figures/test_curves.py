from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from tests.analysis import synthetic
from thalweg.analysis.figures.curves import (
    column,
    curve,
    effective_rate,
    entry,
    running_sum,
    step_axis,
)


def table(seed: int, branch: str, steps: list[int], loss: list[float]) -> pd.DataFrame:
    return pd.DataFrame({"seed": seed, "branch": branch, "step": steps, "loss": loss})


def test_the_line_is_the_mean_and_the_band_the_extremes_over_seeds() -> None:
    data = pd.concat([table(seed, "sgd", [0, 1], [1.0 + seed, 4.0**seed]) for seed in range(3)])
    line = curve(data, "sgd", column("loss"), step_axis(data))
    assert line is not None
    assert line.center.tolist() == [2.0, 7.0]
    assert line.low.tolist() == [1.0, 1.0]
    assert line.high.tolist() == [3.0, 16.0]
    geometric = curve(data, "sgd", column("loss"), step_axis(data), logarithmic=True)
    assert geometric is not None
    assert geometric.center == pytest.approx([6.0 ** (1 / 3), 4.0])


def test_seeds_that_branch_at_different_steps_share_an_axis_of_steps_after_it() -> None:
    data = pd.concat(
        [
            table(seed, branch, list(range(first, first + 21, 5)), [1.0 + seed] * 5)
            for seed, point in ((0, 20), (1, 23))
            for branch, first in (("trunk", point - 20), ("sgd", point))
        ]
    )
    axis = step_axis(data)
    assert axis.label == "steps after the branch point"
    assert axis.branch_point == 0.0
    line = curve(data, "sgd", column("loss"), axis)
    assert line is not None
    assert line.steps.tolist() == [0, 5, 10, 15, 20]
    assert line.center.tolist() == [1.5] * 5


def test_equal_branch_points_keep_the_training_steps() -> None:
    axis = step_axis(synthetic.study(2))
    assert axis.label == "training step"
    assert axis.branch_point == synthetic.SWITCH


def test_an_unmeasured_quantity_makes_no_curve() -> None:
    data = synthetic.study(1)
    assert curve(data, "trunk", column("displacement_bulk"), step_axis(data)) is None


def test_unmeasured_rows_are_left_out_not_drawn_as_gaps() -> None:
    data = table(0, "sgd", [0, 1, 2], [1.0, math.nan, 3.0])
    line = curve(data, "sgd", column("loss"), step_axis(data))
    assert line is not None
    assert line.steps.tolist() == [0, 2]


def test_values_at_or_below_zero_have_no_place_on_a_logarithmic_axis() -> None:
    data = table(0, "sgd", [0, 1, 2], [1.0, 0.0, -3.0])
    line = curve(data, "sgd", column("loss"), step_axis(data), logarithmic=True)
    assert line is not None
    assert line.steps.tolist() == [0]


def test_running_sum_is_the_naive_sum_over_a_centred_window() -> None:
    values = np.random.default_rng(0).standard_normal(40)
    naive = [values[max(0, i - 2) : i + 3].sum() for i in range(40)]
    assert running_sum(values, 5 / 40) == pytest.approx(naive)
    assert running_sum(values, 0.0) == pytest.approx(values)


def test_an_effective_learning_rate_is_a_ratio_of_sums_not_a_mean_of_ratios() -> None:
    data = table(0, "sgd", [0, 1, 2], [0.0] * 3)
    data["above"], data["below"] = [1.0, 1.0, 1.0], [1.0, 1.0, 0.001]
    _, rate = effective_rate("above", "below", 1.0)(data)
    assert rate[1] == pytest.approx(3 / 2.001)


def test_entries_of_lists_are_read_where_there_is_a_list() -> None:
    data = table(0, "sgd", [0, 1, 2], [0.0] * 3)
    data["eigenvalues"] = [[3.0, 2.0], None, [5.0, 1.0]]
    steps, values = entry("eigenvalues", 1)(data)
    assert steps.tolist() == [0, 2]
    assert values.tolist() == [2.0, 1.0]


def test_a_curve_begins_where_all_seeds_have_begun() -> None:
    rows = [
        {"seed": seed, "branch": "trunk", "step": step, "loss": 1.0 + seed}
        for seed, length in ((0, 10), (1, 20))
        for step in range(length)
    ]
    rows += [{"seed": s, "branch": "sgd", "step": n, "loss": 1.0} for s, n in ((0, 9), (1, 19))]
    data = pd.DataFrame(rows)
    found = curve(data, "trunk", column("loss"), step_axis(data))
    assert found is not None
    assert found.steps[0] == -9
    assert set(found.center) == {1.5}
