"""One call makes figures, tables and page, at any time, or refuses a name with the nearest one."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from tests.analysis.regimes.sweeps import fill, grid, sweep_of, verdict, write_run
from thalweg.analysis.regimes import conclude_sweep
from thalweg.analysis.regimes.conclusion import _file_names
from thalweg.errors import InvalidInput

PLANE = grid(lr=[0.01, 0.1], batch_size=[10, 50])


def test_everything_is_in_the_sweeps_folder(quick_path: Path) -> None:
    sweep = sweep_of(quick_path, PLANE, seeds=(0, 1))
    fill(sweep, lambda _: "holds", branches=("trunk", "sgd", "bulk-sgd"))
    page = conclude_sweep(sweep)
    assert page == sweep.path / "report.html"
    assert sorted(file.name for file in (sweep.path / "figures").glob("*.png")) == [
        "branches-loss.png",
        "claim-bulk-suffices.png",
        "curves-loss.png",
        "phase-loss.png",
    ]
    assert len(pd.read_csv(sweep.path / "points.csv")) == 4 * 2 * 3
    assert len(pd.read_csv(sweep.path / "verdicts.csv")) == 4


def test_it_can_be_asked_at_any_time(quick_path: Path) -> None:
    sweep = sweep_of(quick_path, PLANE)
    assert "0</b> of <b>12</b> runs done" in conclude_sweep(sweep).read_text(encoding="utf-8")
    write_run(sweep.points[1].study, 0, "sgd", {"loss": [1.0]}, "running")
    html = conclude_sweep(sweep).read_text(encoding="utf-8")
    assert "no run of sgd that is done has measured loss" in html
    write_run(sweep.points[0].study, 0, "sgd", {"loss": [1.0, 0.5]})
    next(sweep.points[0].study.run(0, "sgd").metrics.iterdir()).write_bytes(b"?")
    html = conclude_sweep(sweep).read_text(encoding="utf-8")
    assert "<b>1</b> damaged" in html
    assert "Failed and damaged runs" in html


def test_a_sweep_of_one_point_has_a_page(quick_path: Path) -> None:
    sweep = fill(sweep_of(quick_path, [{}], seeds=(0,)), lambda _: "undecided")
    html = conclude_sweep(sweep).read_text(encoding="utf-8")
    assert "<b>1</b> point<" in html
    assert 'href="./../runs/point-0"' in html


def test_axes_statistic_and_branch_can_be_chosen(quick_path: Path) -> None:
    sweep = fill(sweep_of(quick_path, PLANE, seeds=(0,)), branches=("trunk", "sgd", "bulk-sgd"))
    conclude_sweep(sweep, axes=["batch_size"], statistic="test_accuracy", branch="bulk-sgd")
    drawn = pd.read_csv(sweep.path / "figures" / "branches-test_accuracy.csv")
    assert drawn["mean"].tolist() == [90.0] * 8
    conclude_sweep(sweep, axes=["batch_size", "lr"], branch="bulk-sgd")
    drawn = pd.read_csv(sweep.path / "figures" / "phase-loss.csv")
    assert set(drawn["branch"]) == {"bulk-sgd"}


@pytest.mark.parametrize(
    ("asked", "nearest"),
    [
        ({"axes": ["batch_sise"]}, "batch_size"),
        ({"statistic": "los"}, "loss"),
        ({"branch": "bulk-sdg"}, "bulk-sgd"),
    ],
)
def test_a_name_that_is_none_is_refused_with_the_nearest(
    quick_path: Path, asked: dict[str, str], nearest: str
) -> None:
    sweep = fill(sweep_of(quick_path, PLANE, seeds=(0,)), branches=("sgd", "bulk-sgd"))
    with pytest.raises(InvalidInput, match=f"did you mean '{nearest}'"):
        conclude_sweep(sweep, **asked)  # type: ignore[arg-type]
    assert not sweep.path.exists()


def test_each_claim_has_a_file_of_its_own() -> None:
    labels = ["edge", "edge: a against b", "edge: a/against b", "../../x", "…"]
    names = list(_file_names(labels).values())
    assert names[:3] == ["claim-edge", "claim-edge-a-against-b", "claim-edge-a-against-b~2"]
    assert len(set(names)) == len(names)
    assert all("/" not in name for name in names)


def test_verdicts_of_one_point_alone_are_counted(quick_path: Path) -> None:
    sweep = fill(sweep_of(quick_path, PLANE, seeds=(0,)))
    sweep.points[2].study.write_verdicts([verdict("holds")])
    html = conclude_sweep(sweep).read_text(encoding="utf-8")
    assert "Holds at 1 of 4 points, is not judged yet at 3." in html
