from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from tests.analysis.claims.branches import SEEDS, falling, table
from thalweg.analysis.figures.catalogue import save_figures

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
