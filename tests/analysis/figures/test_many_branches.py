from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.analysis import synthetic
from thalweg.analysis.figures import save_figures
from thalweg.analysis.figures.alignment import BATCH_SIZE
from thalweg.analysis.figures.comparison import BRANCH_COMPARISON
from thalweg.analysis.figures.curves import step_axis, tidy
from thalweg.analysis.figures.dots import Dots
from thalweg.analysis.figures.learning_rates import bulk_over_dominant
from thalweg.analysis.figures.saving import NotDrawableError, Source
from thalweg.analysis.figures.windows import mean_since, ratio_of_means

ROLES = {"plain": "sgd", "dominant": "dom-sgd", "bulk": "bulk-sgd"}


def source(data: pd.DataFrame) -> Source:
    return Source(data, step_axis(data), ROLES)


def run(loss: list[float], first: int = 0) -> pd.DataFrame:
    return pd.DataFrame({"step": range(first, first + len(loss)), "loss": loss})


def test_a_study_of_many_branches_is_drawn_over_both_columns_with_all_in_the_csv(
    tmp_path: Path,
) -> None:
    from PIL import Image

    data = synthetic.variants(1)
    figure = save_figures(data, tmp_path, figures=["training-loss"]).saved[0]
    assert set(pd.read_csv(figure.csv)["branch"]) == set(data["branch"])
    with Image.open(figure.png) as image:
        assert image.width == 1400


def test_many_branches_of_one_family_are_drawn_in_one_panel(tmp_path: Path) -> None:
    from PIL import Image

    variants = {f"sgd-batch-{size}": "sgd" for size in (1, 2, 5, 10, 200, 500, 1000)}
    data = synthetic.with_branches(synthetic.study(1, 20), variants)
    figure = save_figures(data, tmp_path, ROLES, ["training-loss"]).saved[0]
    assert set(variants) < set(pd.read_csv(figure.csv)["branch"])
    with Image.open(figure.png) as image:
        assert image.width == 680


def test_a_comparison_grows_with_its_rows(tmp_path: Path) -> None:
    from PIL import Image

    heights = []
    for data in (synthetic.study(2, 20), synthetic.optimizers(2)):
        figure = save_figures(data, tmp_path, ROLES, ["branch-comparison"]).saved[0]
        with Image.open(figure.png) as image:
            heights.append(image.height)
    assert heights[1] > 4 * heights[0]


def test_each_branch_is_compared_with_the_unsplit_one_of_its_optimizer_and_seed() -> None:
    data = synthetic.optimizers(3)
    table = tidy(BRANCH_COMPARISON.curves(source(data)))
    row = table[(table["branch"] == "bulk-adam-frozen") & (table["seed"] == 1)].iloc[0]
    assert row["divided_by"] == "adam"
    late = data[(data["seed"] == 1) & (data["step"] >= 1040)].groupby("branch")["loss"].mean()
    assert row["value"] == pytest.approx(late["bulk-adam-frozen"] / late["adam"])
    # Before the branches, and the unsplit ones themselves: nothing to divide by.
    assert not {"adam-start", "adam", "sgd"} & set(table["branch"])


def test_a_study_without_a_second_branch_says_why_it_has_no_comparison() -> None:
    data = synthetic.study(1, 20)
    alone = data[data["branch"].isin(["trunk", "sgd"])].reset_index(drop=True)
    with pytest.raises(NotDrawableError, match="no branch to compare"):
        BRANCH_COMPARISON.curves(source(alone))


def test_late_alignment_is_the_mean_over_the_last_half_of_each_unsplit_branch() -> None:
    data = synthetic.with_branches(synthetic.study(2, 20), {"gd": "sgd"})
    table = tidy(BATCH_SIZE.curves(source(data)))
    assert set(table["branch"]) == {"sgd", "gd"}
    late = data[(data["branch"] == "gd") & (data["seed"] == 1) & (data["step"] >= 800)]
    row = (table["branch"] == "gd") & (table["quantity"] == "alignment_gradient")
    value = table[row & (table["seed"] == 1)]["value"].iloc[0]
    assert value == pytest.approx(late["alignment_gradient"].mean())


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


def test_a_diverged_seed_is_counted_beside_its_row(tmp_path: Path) -> None:
    data = synthetic.study(2, 20)
    data.loc[(data["branch"] == "bulk-sgd") & (data["seed"] == 1), "loss"] = np.inf
    figure = save_figures(data, tmp_path, figures=["branch-comparison"]).saved[0]
    table = pd.read_csv(figure.csv)
    assert np.isinf(table[(table["branch"] == "bulk-sgd") & (table["seed"] == 1)]["value"]).all()
    assert np.isfinite(table["mean"]).all()


def test_the_ratio_of_learning_rates_is_one_of_sums_over_the_first_part_of_a_run() -> None:
    rows = pd.DataFrame(
        {
            "step": [0, 1, 10],
            "lr_numerator_dominant": [1.0, 3.0, math.nan],
            "lr_denominator_dominant": [10.0, 30.0, 1.0],
            "lr_numerator_bulk": [1.0, 1.0, 1.0],
            "lr_denominator_bulk": [2.0, 3.0, 1.0],
        }
    )
    assert bulk_over_dominant(rows, 0.1) == pytest.approx((2 / 5) / (4 / 40))
    assert bulk_over_dominant(rows, 1.0) == bulk_over_dominant(rows, 0.1)
    assert math.isnan(bulk_over_dominant(rows.assign(lr_numerator_bulk=-1.0), 1.0))
