"""All studies at once: which there are, and the page on what they gave."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from tests.lab.small_study import begin, execute, small_spec
from thalweg.analysis.all_studies import conclude_all, reproductions
from thalweg.analysis.figures.drawing import COLUMN_WIDTH, PAGE_WIDTH
from thalweg.analysis.figures.figure import SavedFigure
from thalweg.analysis.report.pages import embedded_figure
from thalweg.lab.study import conclude


def test_the_papers_studies_and_their_extensions_are_two_lists() -> None:
    of_paper = [spec.name for spec in reproductions(overrides=["--seeds", "7"])]
    extensions = [spec.name for spec in reproductions(extensions=True)]
    assert of_paper[:3] == ["main", "alignment", "noise"]
    assert {"valley", "quadratic", "edge", "sam", "optimizers", "robustness"} < set(of_paper)
    assert not set(of_paper) & set(extensions)


def test_what_is_overridden_holds_for_every_study_without_a_problem_of_its_own() -> None:
    seeds = {spec.name: spec.seeds for spec in reproductions(overrides=["--seeds", "7"])}
    assert seeds["noise"] == (7,)
    assert seeds["valley"] == (0, 1, 2)


def test_the_data_folder_goes_to_the_studies_that_read_files() -> None:
    specs = reproductions(data_dir="some/folder", extensions=True)
    folders = {spec.name: getattr(spec.problem.data, "data_dir", None) for spec in specs}
    assert folders["block-sharpness"] == "some/folder"
    assert folders["dion"] is None


def test_one_page_has_the_verdicts_and_figures_of_all(quick_path: Path) -> None:
    results = []
    for name in ("one", "two <b>"):
        changes = {
            "description": name,
            "claims": ["gradient-aligns"],
            "figures": ["training-loss"],
            "branches": {"sgd": {"steps": 3}},
            "phases.0.steps": 3,
        }
        spec = small_spec(changes)
        study = begin(quick_path / name.partition(" ")[0], spec)
        execute(study, spec, "trunk", "sgd")
        results.append(conclude(study, spec))
    page = conclude_all(results, quick_path)
    html = page.read_text(encoding="utf-8")
    assert page == quick_path / "report.html"
    assert html.count("data:image/png;base64,") == 2
    assert html.count("gradient-aligns") >= 2
    assert "one/report.html" in html
    assert "two &lt;b&gt;" in html
    assert "<script" not in html
    assert "? undecided" in html
    for link in set(re.findall(r'href="#([^"]*)"', html)):
        assert f'id="{link}"' in html


@pytest.mark.parametrize(("inches", "wide"), [(COLUMN_WIDTH, False), (PAGE_WIDTH, True)])
def test_a_figure_as_wide_as_a_page_spans_it(tmp_path: Path, inches: float, wide: bool) -> None:
    png = tmp_path / "training-loss.png"
    Figure(figsize=(inches, 2)).savefig(png, dpi=200)
    figure = SavedFigure("training-loss", "Loss", "of all", png, png, png)
    assert embedded_figure(figure, tmp_path)["wide"] == wide
