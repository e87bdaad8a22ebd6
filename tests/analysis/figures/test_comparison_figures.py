from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.analysis import synthetic
from tests.analysis.claims.branches import SEEDS, falling, table
from thalweg import registry
from thalweg.analysis.figures import save_figures
from thalweg.analysis.figures.comparison_figures import bulk_over_dominant
from thalweg.analysis.figures.curves import step_axis, tidy
from thalweg.analysis.figures.figure import NotDrawableError, Source

NAMES = ("sgd", "momentum", "adam", "muon", "bulk_sgd")
ROLES = {"plain": "sgd", "bulk": "bulk-sgd"}
FIGURE = ["all-methods"]


def study(names: tuple[str, ...] = NAMES) -> pd.DataFrame:
    """The n-th method: sharpness n + 1, effective learning rates 0.1 (n + 1) and 0.3."""
    columns = {
        name: {
            "loss": falling(0.1),
            "sharpness": number + 1.0,
            "alignment_gradient": lambda part: np.where(part < 0.5, 0.1, 0.8),
            "lr_numerator_dominant": 0.2 * (number + 1),
            "lr_denominator_dominant": 2.0,
            "lr_numerator_bulk": 0.6,
            "lr_denominator_bulk": 2.0,
        }
        for number, name in enumerate(names)
    }
    return table(0.0, 100, **columns)


def test_each_method_has_its_values_in_the_table(tmp_path: Path) -> None:
    saved = save_figures(study(), tmp_path, ROLES, FIGURE).saved[0]
    assert saved.png.read_bytes().startswith(b"\x89PNG")
    drawn = pd.read_csv(saved.csv)
    assert len(drawn) == 5 * 5 * SEEDS
    order = [name.replace("_", "-") for name in NAMES]

    def means(quantity: str) -> list[float]:
        rows = drawn[drawn["quantity"] == quantity]
        of_branch = dict(zip(rows["branch"], rows["mean"], strict=True))
        return [of_branch[name] for name in order]

    np.testing.assert_allclose(means("sharpness"), [1, 2, 3, 4, 5])
    np.testing.assert_allclose(means("effective_lr_dominant"), [0.1, 0.2, 0.3, 0.4, 0.5])
    np.testing.assert_allclose(means("effective_lr_bulk"), 0.3)
    np.testing.assert_allclose(means("alignment_gradient"), 0.8)
    # The rows of the last tenth of the steps: five, of 41.
    expected = np.mean(0.1 ** (np.arange(36, 41) / 40))
    np.testing.assert_allclose(means("loss"), expected, rtol=1e-6)


def test_a_part_that_climbs_is_left_out_and_a_run_that_diverged_is_counted(tmp_path: Path) -> None:
    data = study()
    data.loc[data["branch"] == "adam", "lr_numerator_bulk"] = -1.0
    last = (data["branch"] == "muon") & (data["seed"] == 0) & (data["step"] == data["step"].max())
    data.loc[last, "loss"] = np.nan
    drawn = pd.read_csv(save_figures(data, tmp_path, ROLES, FIGURE).saved[0].csv)
    rates = drawn[drawn["quantity"] == "effective_lr_bulk"]
    assert "adam" not in set(rates["branch"])
    lost = [
        bool(np.isnan(value))
        for quantity, branch, value in zip(
            drawn["quantity"], drawn["branch"], drawn["value"], strict=True
        )
        if (quantity, branch) == ("loss", "muon")
    ]
    assert lost == [True, False, False]


def test_few_methods_are_not_set_side_by_side(tmp_path: Path) -> None:
    data = study(("sgd", "momentum", "adam", "bulk_sgd"))
    result = save_figures(data, tmp_path, ROLES, FIGURE)
    assert result.skipped == {"all-methods": "fewer than 4 unsplit branches to set side by side"}


# One quantity, branch against branch.

STANDARD_ROLES = {"plain": "sgd", "dominant": "dom-sgd", "bulk": "bulk-sgd"}


def source(data: pd.DataFrame) -> Source:
    return Source(data, step_axis(data), STANDARD_ROLES)


@pytest.mark.slow
def test_a_comparison_grows_with_its_rows(tmp_path: Path) -> None:
    from PIL import Image

    heights = []
    for data in (synthetic.study(2, 20), synthetic.optimizers(2)):
        figure = save_figures(data, tmp_path, STANDARD_ROLES, ["branch-comparison"]).saved[0]
        with Image.open(figure.png) as image:
            heights.append(image.height)
    assert heights[1] > 4 * heights[0]


def test_each_branch_is_compared_with_the_unsplit_one_of_its_optimizer_and_seed() -> None:
    data = synthetic.optimizers(3)
    table = tidy(registry.figures["branch-comparison"].curves(source(data)))
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
        registry.figures["branch-comparison"].curves(source(alone))


def test_late_alignment_is_the_mean_over_the_last_half_of_each_unsplit_branch() -> None:
    data = synthetic.with_branches(synthetic.study(2, 20), {"gd": "sgd"})
    table = tidy(registry.figures["batch-size"].curves(source(data)))
    assert set(table["branch"]) == {"sgd", "gd"}
    late = data[(data["branch"] == "gd") & (data["seed"] == 1) & (data["step"] >= 800)]
    row = (table["branch"] == "gd") & (table["quantity"] == "alignment_gradient")
    value = table[row & (table["seed"] == 1)]["value"].iloc[0]
    assert value == pytest.approx(late["alignment_gradient"].mean())


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
