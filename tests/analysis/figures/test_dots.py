from __future__ import annotations

import math

import pandas as pd
import pytest

from thalweg.analysis.figures.dots import Dots, mean_since, ratio_of_means


def run(loss: list[float], first: int = 0) -> pd.DataFrame:
    return pd.DataFrame({"step": range(first, first + len(loss)), "loss": loss})


def test_a_ratio_is_taken_over_the_steps_that_both_branches_have() -> None:
    long, short = run([8.0] * 50 + [4.0] * 51), run([2.0] * 51)
    assert ratio_of_means(short, long, "loss", 0.1) == pytest.approx(2 / ((5 * 8 + 4) / 6))
    assert ratio_of_means(short, run([1.0] * 9, first=50), "loss", 0.1) is None


def test_a_branch_that_stops_being_finite_has_no_finite_ratio() -> None:
    lost = run([1.0] * 90 + [math.nan] * 11)
    assert ratio_of_means(lost, run([1.0] * 101), "loss", 0.1) == math.inf
    assert ratio_of_means(run([1.0] * 101), lost, "loss", 0.1) is None


def test_a_late_mean_leaves_out_unmeasured_rows() -> None:
    assert mean_since(run([9.0, 9.0, 1.0, math.nan, 3.0]), "loss", 0.5) == 2.0
    assert math.isnan(mean_since(run([9.0, 9.0, math.nan, math.nan]), "loss", 0.5))


def test_dots_have_a_geometric_mean_and_leave_diverged_seeds_out() -> None:
    dots = Dots("bulk-sgd", {0: 1.0, 1: 4.0, 2: math.inf}, logarithmic=True)
    interval = dots.interval()
    assert interval is not None
    assert interval.mean == pytest.approx(2.0)
    assert interval.low * interval.high == pytest.approx(4.0)
    assert Dots("x", {0: math.nan}).interval() is None
    assert len(dots.rows("ratio")) == 3
