"""A statistic against one setting: lines, bands, and what cannot be drawn."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest

from tests.analysis.regimes.sweeps import Settings, fill, grid, sweep_of
from thalweg.analysis.figures.figure import NotDrawableError, SavedFigure
from thalweg.analysis.regimes.curves_along import _Curves, draw_by_branch, draw_by_setting
from thalweg.analysis.regimes.plane import plane_of
from thalweg.analysis.regimes.table import SweepTable, read_table

PLANE = grid(lr=[0.01, 0.1, 1.0], batch_size=[10, "all"])


def loss(settings: Settings, seed: int) -> float:
    return math.inf if settings["lr"] == 1.0 and seed == 0 else settings["lr"] * (1 + seed)


def table_in(
    folder: Path, settings: list[Settings], seeds: tuple[int, ...] = (0, 1, 2)
) -> SweepTable:
    branches = ("trunk", "sgd", "bulk-sgd")
    return read_table(fill(sweep_of(folder, settings, seeds), branches=branches, loss=loss))


def files_in(folder: Path) -> SavedFigure:
    return SavedFigure.inside(folder, "curves", "Title", "")


def test_a_line_for_each_value_of_the_other_setting(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[_Curves] = []
    draw = _Curves.__call__
    monkeypatch.setattr(_Curves, "__call__", lambda s, c: (shown.append(s), draw(s, c)))
    table = table_in(quick_path, PLANE)
    saved = draw_by_setting(table, plane_of(table.sweep), "loss", "sgd", files_in(quick_path))
    assert [line.label for line in shown[0].lines] == ["10", "all"]
    assert [sorted(line.rows) for line in shown[0].lines] == [[0, 2, 4], [1, 3, 5]]
    assert len({line.shape for line in shown[0].lines}) == 2
    data = pd.read_csv(saved.csv)
    assert data["seeds"].tolist() == [3, 3, 3, 3, 2, 2]
    assert data["diverged"].tolist() == [0, 0, 0, 0, 1, 1]
    assert ((data["low"] <= data["mean"]) & (data["mean"] <= data["high"])).all()
    assert saved.png.stat().st_size
    assert saved.pdf.read_bytes().startswith(b"%PDF")


def test_a_line_for_each_branch_and_a_panel_for_each_other_setting(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[_Curves] = []
    draw = _Curves.__call__
    monkeypatch.setattr(_Curves, "__call__", lambda s, c: (shown.append(s), draw(s, c)))
    table = table_in(quick_path, PLANE)
    saved = draw_by_branch(table, plane_of(table.sweep), "loss", files_in(quick_path))
    assert [line.label for line in shown[0].lines] == ["SGD", "Bulk-SGD"]
    assert [panel.title for panel in shown[0].panels] == ["batch_size = 10", "batch_size = all"]
    assert set(pd.read_csv(saved.csv)["branch"]) == {"sgd", "bulk-sgd"}


def test_along_one_setting_alone_there_are_lines_for_branches_only(quick_path: Path) -> None:
    table = table_in(quick_path, grid(lr=[0.1, 0.2]), seeds=(0,))
    plane = plane_of(table.sweep)
    with pytest.raises(NotDrawableError, match="fewer than two settings"):
        draw_by_setting(table, plane, "loss", "sgd", files_in(quick_path))


def test_points_off_a_grid_have_no_curves(quick_path: Path) -> None:
    settings = [{"lr": 0.01 * n, "batch_size": 7 * n % 31} for n in range(1, 9)]
    table = table_in(quick_path, settings, seeds=(0,))
    for draw in (
        lambda plane: draw_by_setting(table, plane, "loss", "sgd", files_in(quick_path)),
        lambda plane: draw_by_branch(table, plane, "loss", files_in(quick_path)),
    ):
        with pytest.raises(NotDrawableError, match="not on a grid"):
            draw(plane_of(table.sweep))


def test_what_was_never_measured_has_no_curves(quick_path: Path) -> None:
    table = table_in(quick_path, PLANE[:4], seeds=(0,))
    for name in ("noise_norm", "sharpness"):
        empty = SweepTable(
            table.sweep, table.runs.drop(columns="sharpness"), table.verdicts, table.columns
        )
        with pytest.raises(NotDrawableError, match="has measured"):
            draw_by_branch(empty, plane_of(table.sweep), name, files_in(quick_path))
