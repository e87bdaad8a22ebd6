from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

from tests.analysis import synthetic
from tests.sampling import few
from thalweg import registry
from thalweg.analysis.figures import SavedFigures, drawing, save_figures
from thalweg.errors import InvalidInput

NAMES = [
    "training-loss",
    "branch-comparison",
    "alignment",
    "alignment-of-branches",
    "own-metric",
    "eigenvalues",
    "sharpness",
    "sharpness-of-branches",
    "stability",
    "effective-learning-rates",
    "effective-learning-rate-ratio",
    "critical-learning-rates",
    "distance",
    "overlap",
    "noise",
    "test-accuracy",
]
SOME = ["training-loss", "branch-comparison", "eigenvalues", "overlap"]
ONE_BRANCH = {"batch-size": "fewer than two unsplit branches to compare"}
FIRST = "training-loss"


@pytest.fixture(scope="module")
def study() -> pd.DataFrame:
    return synthetic.with_later_probes(synthetic.study(every=20))


@pytest.fixture(scope="module")
def saved(study: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> SavedFigures:
    folder = tmp_path_factory.mktemp("study") / "figures"
    return save_figures(study, folder, figures=[*SOME, "batch-size"])


@pytest.mark.parametrize("names", few(1, [SOME, NAMES]), ids=["some", "all"])
def test_every_figure_is_saved_as_png_pdf_and_csv(
    names: list[str], saved: SavedFigures, study: pd.DataFrame, tmp_path: Path
) -> None:
    if names != SOME:
        saved = save_figures(study, tmp_path, figures=[*names, "batch-size"])
    assert [figure.name for figure in saved.saved] == names
    assert dict(saved.skipped) == ONE_BRANCH
    for figure in saved.saved:
        assert figure.png.read_bytes().startswith(b"\x89PNG")
        assert figure.pdf.read_bytes().startswith(b"%PDF")
        assert len(pd.read_csv(figure.csv)) > 0
        assert figure.caption


def test_the_figures_of_the_paper_come_before_those_of_the_toys() -> None:
    names = list(registry.figures)
    toys = {"valley", "quadratic-rates", "quadratic-alignment"}
    assert max(map(names.index, NAMES)) < min(map(names.index, toys))


def test_pdf_fonts_are_those_that_journals_accept(saved: SavedFigures) -> None:
    for figure in saved.saved:
        content = figure.pdf.read_bytes()
        assert b"/Type3" not in content, figure.name
        assert b"/CIDFontType2" in content, figure.name


def test_png_is_one_column_wide_at_200_dots_an_inch(saved: SavedFigures) -> None:
    from PIL import Image

    for figure in saved.saved:
        with Image.open(figure.png) as image:
            assert image.width == round(200 * drawing.COLUMN_WIDTH)


def test_csv_holds_the_mean_and_the_range_over_seeds(
    saved: SavedFigures, study: pd.DataFrame
) -> None:
    table = pd.read_csv(saved.saved[0].csv)
    end = table[(table["branch"] == "sgd") & (table["step"] == 1100)].iloc[0]
    losses = study[(study["branch"] == "sgd") & (study["step"] == 1100)]["loss"]
    assert end["mean"] == pytest.approx(np.exp(np.log(losses).mean()))
    assert (end["lowest_seed"], end["highest_seed"]) == pytest.approx((losses.min(), losses.max()))
    assert end["seeds"] == 3


def test_csv_holds_the_early_training_that_the_drawing_leaves_out(saved: SavedFigures) -> None:
    table = pd.read_csv(saved.saved[0].csv)
    assert table["step"].min() == 0


def test_the_same_data_give_the_same_bytes(
    saved: SavedFigures, study: pd.DataFrame, tmp_path: Path
) -> None:
    again = save_figures(study, tmp_path, figures=[registry.figures["training-loss"]]).saved[0]
    assert again.png.read_bytes() == saved.saved[0].png.read_bytes()
    assert again.pdf.read_bytes() == saved.saved[0].pdf.read_bytes()


def test_a_figure_without_its_columns_is_named_and_the_others_are_drawn(
    study: pd.DataFrame, tmp_path: Path
) -> None:
    few = study.drop(columns=["test_accuracy", "solved_eigenvalues"])
    names = ["eigenvalues", "test-accuracy", "training-loss"]
    result = save_figures(few, tmp_path, figures=names)
    assert result.skipped == {
        "eigenvalues": "no column solved_eigenvalues",
        "test-accuracy": "no column test_accuracy",
    }
    assert [figure.name for figure in result.saved] == ["training-loss"]
    assert not (tmp_path / "test-accuracy.png").exists()


def test_a_figure_whose_columns_were_never_measured_is_named(
    study: pd.DataFrame, tmp_path: Path
) -> None:
    result = save_figures(
        study.assign(test_accuracy=np.nan), tmp_path, figures=[registry.figures["test-accuracy"]]
    )
    assert result.skipped == {"test-accuracy": "never measured: test_accuracy"}


@pytest.mark.parametrize(
    "branches",
    few(1, [["sgd"], ["trunk"], ["trunk", "sgd"], ["dom-sgd", "bulk-sgd"], ["trunk", "dom-sgd"]]),
)
def test_studies_with_fewer_branches_are_drawn(
    branches: list[str], study: pd.DataFrame, tmp_path: Path
) -> None:
    part = study[study["branch"].isin(branches) & (study["seed"] == 0)]
    chosen = [registry.figures[name] for name in ("training-loss", "effective-learning-rates")]
    result = save_figures(part, tmp_path, figures=chosen)
    assert len(result.saved) == 2


def test_a_diverged_branch_is_drawn_as_far_as_it_is_finite(
    study: pd.DataFrame, tmp_path: Path
) -> None:
    data = study.copy()
    lost = (data["branch"] == "bulk-sgd") & (data["step"] > 700)
    data.loc[lost, ["loss", "test_accuracy"]] = [np.inf, np.nan]
    save_figures(data, tmp_path, figures=[registry.figures["training-loss"]])
    table = pd.read_csv(tmp_path / "training-loss.csv")
    assert table[table["branch"] == "bulk-sgd"]["step"].max() == 700


def test_further_branches_are_drawn_too(study: pd.DataFrame, tmp_path: Path) -> None:
    frozen = study[study["branch"] == "bulk-sgd"].assign(branch="frozen-bulk-sgd")
    data = pd.concat([study, frozen], ignore_index=True)
    save_figures(data, tmp_path, figures=[registry.figures["training-loss"]])
    assert "frozen-bulk-sgd" in set(pd.read_csv(tmp_path / "training-loss.csv")["branch"])


def test_the_users_matplotlib_settings_stay_as_they_were(
    study: pd.DataFrame, tmp_path: Path
) -> None:
    with mpl.rc_context({"lines.linewidth": 7.0, "pdf.fonttype": 3}):
        before = dict(mpl.rcParams)
        save_figures(study, tmp_path, figures=[registry.figures["alignment"]])
        assert dict(mpl.rcParams) == before


def test_neither_import_nor_drawing_loads_pyplot_and_import_alone_not_even_matplotlib() -> None:
    code = (
        "import sys, thalweg.analysis.figures;"
        "heavy = {'matplotlib', 'pandas', 'torch', 'plotly'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_later_study_adds_its_figure_once(study: pd.DataFrame, tmp_path: Path) -> None:
    again = replace(registry.figures["alignment"], name="alignment-again")
    with patch.dict(registry.figures, clear=True):
        registry.figures.add(again.name, again)
        saved = save_figures(study, tmp_path).saved
        assert [figure.name for figure in saved] == ["alignment-again"]
        with pytest.raises(InvalidInput, match="not used yet"):
            registry.figures.add(again.name, again)


def test_figures_can_be_asked_for_by_name(study: pd.DataFrame, tmp_path: Path) -> None:
    result = save_figures(study, tmp_path, figures=["overlap", "batch-size"])
    assert [figure.name for figure in result.saved] == ["overlap"]
    assert dict(result.skipped) == ONE_BRANCH


def test_an_unknown_figure_is_refused_with_the_nearest_name_before_anything_is_drawn(
    study: pd.DataFrame, tmp_path: Path
) -> None:
    with pytest.raises(InvalidInput, match="did you mean 'overlap'"):
        save_figures(study, tmp_path / "figures", figures=["training-loss", "overlaps"])
    assert not (tmp_path / "figures").exists()
