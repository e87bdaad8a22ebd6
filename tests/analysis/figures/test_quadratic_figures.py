from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.lab import toys
from thalweg.analysis.figures import SavedFigures, save_figures


@pytest.fixture(scope="module")
def study() -> pd.DataFrame:
    return toys.quadratic()


@pytest.fixture(scope="module")
def saved(study: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> SavedFigures:
    return draw(study, tmp_path_factory.mktemp("figures"))


def draw(data: pd.DataFrame, folder: Path) -> SavedFigures:
    return save_figures(data, folder, {}, ["quadratic-rates", "quadratic-alignment"])


def test_both_figures_are_saved_with_what_they_draw(saved: SavedFigures) -> None:
    assert saved.skipped == {}
    for figure in saved.saved:
        assert figure.png.read_bytes().startswith(b"\x89PNG")
        assert figure.pdf.read_bytes().startswith(b"%PDF")
        assert len(pd.read_csv(figure.csv)) > 0


def test_loss_changes_are_as_expected_and_change_sign_at_the_critical_rate(
    saved: SavedFigures,
) -> None:
    table = pd.read_csv(saved.saved[0].csv)
    assert set(table["branch"]) == set(toys.RATE_ROLES.values())
    np.testing.assert_allclose(np.log(table["value"] / table["expected"]), 0, atol=0.35)
    rises = (table["learning_rate"] > table["critical_learning_rate"]).tolist()
    assert [value > 1 for value in table["value"]] == rises
    assert [value > 1 for value in table["expected"]] == rises


def test_the_predicted_ratio_starts_at_the_measured_one_and_stays_with_it(
    saved: SavedFigures,
) -> None:
    table = pd.read_csv(saved.saved[1].csv)
    assert set(table["branch"]) == {"trunk", "sgd-low", "sgd-high"}
    table["difference"] = np.log(table["value"]) - np.log(table["predicted"])
    by_step = table.groupby(["branch", "step"])["difference"].mean()  # over seeds
    assert by_step.groupby("branch").first().tolist() == pytest.approx([0, 0, 0], abs=1e-9)
    assert float(by_step.abs().mean()) < 0.25


def test_a_study_without_split_branches_shows_the_alignment_alone(
    study: pd.DataFrame, tmp_path: Path
) -> None:
    data = study[study["branch"].isin(["trunk", "sgd-low"])]
    result = draw(data, tmp_path)
    assert [figure.name for figure in result.saved] == ["quadratic-alignment"]
    assert "no split branches of both parts" in result.skipped["quadratic-rates"]


def test_without_a_spectrum_there_is_no_theory_to_show(study: pd.DataFrame, tmp_path: Path) -> None:
    result = draw(study.assign(solved_eigenvalues=None), tmp_path)
    assert result.saved == ()
    assert "spectrum and noise" in result.skipped["quadratic-alignment"]
