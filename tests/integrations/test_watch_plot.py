from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.networks import silu
from thalweg.errors import InvalidInput
from thalweg.integrations.watch_plot import draw
from thalweg.measure.curvature_shares import PARTS_OF_SHARPNESS
from thalweg.measure.watch import watch
from thalweg.measure.watcher import COLUMNS


def test_further_probes_fill_columns_of_their_own_and_are_drawn(tmp_path: Path) -> None:
    case = silu()
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1)
    file = tmp_path / "rows.csv"
    options = {"every": 1, "k": 2, "quiet": True, "file": file, "probes": ["curvature_shares"]}
    with watch(case.model, case.loss, case.data, optimizer, **options) as watcher:  # type: ignore[arg-type]
        for _ in range(3):
            optimizer.zero_grad()
            case.loss(case.model(case.data[0]), case.data[1]).backward()
            optimizer.step()
    row = watcher.history[-1]
    assert list(row)[: len(COLUMNS)] == list(COLUMNS)
    assert len(row["update_shares"]) == len(PARTS_OF_SHARPNESS)
    assert file.read_text().splitlines()[0].split(",") == list(row)
    figure = watcher.plot()
    assert [axes.get_ylabel() for axes in figure.axes] == [
        "loss",
        "curvature",
        "alignment",
        "share of the gradient",
        "share of the update",
    ]
    # Gradient and update of full-batch SGD are one direction: the bands are those of both.
    bands = [len(axes.collections) for axes in figure.axes[3:]]
    assert bands == [len(PARTS_OF_SHARPNESS) + 1] * 2
    figure.savefig(tmp_path / "run.png")


def test_without_shares_three_panels_are_drawn_and_without_rows_none() -> None:
    row = {"step": 0, "loss": 1.0, "sharpness": None, "preconditioned_sharpness": 3.0}
    assert len(draw([row, {**row, "step": 1}]).axes) == 3
    with pytest.raises(InvalidInput, match="nothing was reported"):
        draw([])


def test_lines_go_on_over_quick_rows_and_break_at_failures() -> None:
    def row(step: int, sharpness: float | None, **more: Any) -> dict[str, Any]:
        quick = {"critical_sharpness": 5.0, "learning_rate": 0.1}
        return {"step": step, "loss": 1.0, "sharpness": sharpness, **quick, **more}

    rows = [row(0, 3.0), row(1, None), row(2, 4.0), row(3, None, failure="no"), row(4, 5.0)]
    axes = draw(rows).axes
    labels = [one.get_ylabel() for one in axes]
    assert labels == ["loss", "curvature", "alignment", "along update"]
    (line,) = axes[1].get_lines()
    assert list(line.get_xdata()) == [0, 2, 3, 4]
    assert [math.isnan(value) for value in line.get_ydata()] == [False, False, True, False]  # type: ignore[arg-type]
    critical, limit = axes[3].get_lines()
    assert list(critical.get_xdata()) == [0, 1, 2, 3, 4]
    assert set(limit.get_ydata()) == {20.0}  # type: ignore[arg-type]


def test_an_unknown_probe_is_refused() -> None:
    case = silu()
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1)
    with pytest.raises(InvalidInput, match="curvature_shares"):
        watch(case.model, case.loss, case.data, optimizer, k=2, probes=["curvature_share"])
