from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.analysis import synthetic
from thalweg.analysis.figures import SavedFigures, save_figures
from thalweg.analysis.figures.threshold_figures import progress
from thalweg.measure.curvature_shares import PARTS_OF_SHARPNESS

ROLES = {"plain": "sgd", "dominant": "dom-sgd", "bulk": "bulk-sgd"}
PARTS = {"half": 0.5, "tenth": 0.1, "own-tenth": 0.12}
SHARES = [0.1, 0.2, 0.3, 0.4, 0.5]


def study(seeds: int = 2) -> pd.DataFrame:
    """Trunk and plain branch with shares; Dom- and Bulk- branches at three thresholds."""
    data = synthetic.study(seeds, every=50)
    copies = {f"{part}-sgd-{at}": f"{part}-sgd" for part in ("dom", "bulk") for at in PARTS}
    data = synthetic.with_branches(data, copies, 1.02)
    data = data[~data["branch"].isin(["dom-sgd", "bulk-sgd"])].reset_index(drop=True)
    tails = data["branch"].str.replace(r"^(dom|bulk)-sgd-", "", regex=True)
    data["split_threshold_part"] = tails.map(PARTS)
    whole = data["branch"].isin(["trunk", "sgd"])
    for vector in ("gradient", "minibatch", "update"):
        data[f"{vector}_shares"] = [SHARES if own else None for own in whole]
    return data


def draw(data: pd.DataFrame, folder: Path, *names: str) -> SavedFigures:
    figures = names or ("progress-against-threshold", "curvature-of-gradient")
    return save_figures(data, folder, ROLES, figures)


def test_progress_is_the_log_decrease_over_that_of_the_unsplit_branch(tmp_path: Path) -> None:
    data = study()
    saved, shares = draw(data, tmp_path).saved
    rows = pd.read_csv(saved.csv).query("quantity == 'progress'")
    assert set(rows["branch"]) == {f"{part}-sgd-{at}" for part in ("dom", "bulk") for at in PARTS}
    assert set(rows["divided_by"]) == {"sgd"}
    of_bulk = rows[rows["branch"].str.startswith("bulk")]["value"]
    assert of_bulk.to_numpy() == pytest.approx(1.0, abs=0.15)
    of_dom = rows[rows["branch"].str.startswith("dom")]["value"]
    assert of_dom.to_numpy() == pytest.approx(synthetic.expected_progress(), abs=0.15)
    how = dict(zip(rows["branch"], rows["split_at"], strict=True))
    assert how["dom-sgd-own-tenth"] == "own metric"
    assert how["dom-sgd-tenth"] == "curvature"
    lines = pd.read_csv(saved.csv).query("quantity == 'gradient_share_above_0.1'")
    assert lines["value"].to_numpy() == pytest.approx(SHARES[PARTS_OF_SHARPNESS.index(0.1)])
    for figure in (saved, shares):
        assert figure.png.read_bytes().startswith(b"\x89PNG")


def test_a_split_by_the_dominant_subspace_is_drawn_at_its_last_eigenvalue(tmp_path: Path) -> None:
    tracked = synthetic.study(2, every=50)
    tracked = tracked[tracked["branch"].isin(["dom-sgd", "bulk-sgd"])]
    data = pd.concat([study(), tracked], ignore_index=True)
    (saved,) = draw(data, tmp_path, "progress-against-threshold").saved
    rows = pd.read_csv(saved.csv).query("split_at == 'S_k'")
    assert set(rows["branch"]) == {"dom-sgd", "bulk-sgd"}
    spectrum = synthetic.SPECTRUM[: synthetic.K]
    assert rows["threshold"].to_numpy() == pytest.approx(spectrum[-1] / spectrum[0], rel=0.05)


def test_a_branch_that_diverges_is_drawn_at_the_edge(tmp_path: Path) -> None:
    data = study()
    lost = (data["branch"] == "bulk-sgd-tenth") & (data["step"] > 800)
    data.loc[lost, "loss"] = np.nan
    (saved,) = draw(data, tmp_path, "progress-against-threshold").saved
    rows = pd.read_csv(saved.csv).query("branch == 'bulk-sgd-tenth'")
    assert np.isneginf(rows["value"]).all()


def test_no_progress_of_the_unsplit_branch_is_no_scale() -> None:
    flat = pd.DataFrame({"step": [0, 1, 2], "loss": [1.0, 1.0, 0.99]})
    assert math.isnan(progress(flat, flat))
    falling = pd.DataFrame({"step": [0, 1, 2], "loss": [1.0, 0.7, 0.5]})
    assert progress(falling, falling) == pytest.approx(1.0)


def test_bands_are_the_shares_along_trunk_and_plain_branch(tmp_path: Path) -> None:
    (saved,) = draw(study(), tmp_path, "curvature-of-gradient").saved
    table = pd.read_csv(saved.csv)
    assert set(table["branch"]) == {"trunk", "sgd"}
    assert set(table["quantity"]) == {
        f"{vector}_share_above_{place}"
        for vector in ("gradient", "minibatch", "update")
        for place in range(5)
    }
    assert set(table.query("quantity == 'update_share_above_3'")["mean"]) == {SHARES[3]}


def test_a_study_of_two_optimizers_has_a_panel_each(tmp_path: Path) -> None:
    data = study()
    other = data[data["branch"] != "trunk"].copy()
    other["branch"] = other["branch"].str.replace("sgd", "adamw")
    both = pd.concat([data, other], ignore_index=True)
    progresses, shares = draw(both, tmp_path).saved
    assert set(pd.read_csv(progresses.csv)["divided_by"]) == {"sgd", "adamw"}
    assert set(pd.read_csv(shares.csv)["branch"]) == {"trunk", "sgd", "adamw"}


def test_without_a_split_at_a_curvature_there_is_no_figure(tmp_path: Path) -> None:
    data = study().assign(split_threshold_part=np.nan)
    skipped = draw(data, tmp_path).skipped
    assert "no branch is split" in skipped["progress-against-threshold"]
    assert draw(synthetic.study(2, every=50), tmp_path).skipped.keys() == {
        "progress-against-threshold",
        "curvature-of-gradient",
    }
