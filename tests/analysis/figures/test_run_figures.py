from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from tests.analysis.claims.branches import falling, table, without
from thalweg import registry
from thalweg.analysis.claims.block_sharpness_claims import COLUMNS
from thalweg.analysis.figures import save_figures

VALUES = dict(zip(COLUMNS, (1e-5, 1e-4, 1e-3, 1e-2, 0.1), strict=True))


def study() -> pd.DataFrame:
    """Two unsplit branches, measured every 50 steps."""
    plain = {"loss": falling(0.5), **VALUES}
    other = {"loss": falling(0.4), **dict.fromkeys(COLUMNS, 1.0)}
    data = table(adamw=plain, blockwise=other)
    return without(data, data["step"] % 50 != 0, *COLUMNS)


def test_the_blocks_of_the_first_unsplit_branch_are_drawn(tmp_path: Path) -> None:
    saved = save_figures(study(), tmp_path, {"plain": "adamw"}, ["block-sharpness"]).saved[0]
    assert saved.png.read_bytes().startswith(b"\x89PNG")
    drawn = pd.read_csv(saved.csv)
    assert set(drawn["branch"]) == {"adamw"}
    for column, value in VALUES.items():
        rows = drawn[drawn["quantity"] == column]
        assert rows["step"].tolist() == [100, 150, 200, 250, 300]
        np.testing.assert_allclose(rows["mean"], value, rtol=1e-6)


def test_an_estimate_below_zero_leaves_a_gap(tmp_path: Path) -> None:
    data = study()
    data.loc[data["step"] == 150, COLUMNS[0]] = -1e-6
    save_figures(data, tmp_path, {"plain": "adamw"}, ["block-sharpness"])
    drawn = pd.read_csv(tmp_path / "block-sharpness.csv")
    assert 150 not in drawn[drawn["quantity"] == COLUMNS[0]]["step"].tolist()


def test_a_study_without_blocks_has_no_such_figure(tmp_path: Path) -> None:
    result = save_figures(
        study().drop(columns=[COLUMNS[0]]), tmp_path, {"plain": "adamw"}, ["block-sharpness"]
    )
    assert result.skipped == {"block-sharpness": f"no column {COLUMNS[0]}"}
    assert registry.figures["block-sharpness"].needs == COLUMNS
