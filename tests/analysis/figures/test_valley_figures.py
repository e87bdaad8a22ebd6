from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.lab import toys
from thalweg.analysis.figures import SavedFigures, save_figures
from thalweg.analysis.figures.valley_figures import Trajectory, curvatures

ROLES = {"plain": "sgd", "dominant": "dom-sgd", "bulk": "bulk-sgd"}


@pytest.fixture(scope="module")
def study() -> pd.DataFrame:
    return toys.valley(seeds=2, steps=400)


def draw(data: pd.DataFrame, folder: Path) -> SavedFigures:
    return save_figures(data, folder, ROLES, ["valley"])


def test_the_csv_holds_one_seeds_trajectory_of_each_branch(
    study: pd.DataFrame, tmp_path: Path
) -> None:
    (saved,) = draw(study, tmp_path).saved
    table = pd.read_csv(saved.csv)
    assert list(table["branch"].unique()) == ["sgd", "dom-sgd", "bulk-sgd", "gd"]
    assert set(table["seed"]) == {0}
    end = table[(table["branch"] == "gd") & (table["step"] == 400)].iloc[0]
    assert end["y"] == pytest.approx((1 - 0.0005) ** 400, rel=1e-9)
    assert saved.png.read_bytes().startswith(b"\x89PNG")
    assert saved.pdf.read_bytes().startswith(b"%PDF")


def test_contours_have_the_curvatures_of_the_loss() -> None:
    stream = np.random.default_rng(0)
    x, y = stream.standard_normal((2, 30))
    loss = (700 * x**2 + 3 * y**2) / 2
    line = Trajectory("gd", 0, np.arange(30.0), x, y, loss, np.zeros(30))
    assert curvatures([line]) == pytest.approx((700, 3), rel=1e-9)


def test_a_trunk_of_no_steps_is_no_trajectory(study: pd.DataFrame, tmp_path: Path) -> None:
    start = study[(study["branch"] == "gd") & (study["step"] == 0)].assign(branch="trunk")
    (saved,) = draw(pd.concat([start, study]), tmp_path).saved
    assert "trunk" not in set(pd.read_csv(saved.csv)["branch"])


@pytest.mark.slow
def test_a_study_with_one_branch_is_drawn(study: pd.DataFrame, tmp_path: Path) -> None:
    assert len(draw(study[study["branch"] == "sgd"], tmp_path).saved) == 1


def test_a_problem_with_more_parameters_is_left_out(study: pd.DataFrame, tmp_path: Path) -> None:
    data = study.assign(position=[[1.0, 2.0, 3.0]] * len(study))
    assert "does not have two parameters" in draw(data, tmp_path).skipped["valley"]
    missing = draw(study.drop(columns="position"), tmp_path)
    assert missing.skipped == {"valley": "no column position"}
