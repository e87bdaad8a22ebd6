"""Phase diagrams, looked at by their pixels: a cell has the colour of what is there."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib import colormaps
from matplotlib.image import imread

from tests.analysis.regimes.sweeps import Settings, fill, grid, sweep_of, verdict
from tests.sampling import few
from thalweg.analysis.figures.figure import NotDrawableError, SavedFigure
from thalweg.analysis.regimes.phase_diagram import Picture, Region, draw_claim, draw_statistic
from thalweg.analysis.regimes.plane import plane_of
from thalweg.analysis.regimes.table import SweepTable, read_table
from thalweg.lab.sweeps.points import Sweep

PLANE = grid(lr=[0.01, 0.1, 1.0], batch_size=[10, 50])
GREEN, ORANGE = "#009e73", "#d55e00"


def loss(settings: Settings, seed: int) -> float:
    """One decade a step of the learning rate; at the corner it diverges."""
    return math.inf if settings["lr"] == 1.0 and settings["batch_size"] == 10 else settings["lr"]


def outcome(settings: Settings) -> str:
    return "holds" if settings["lr"] < 0.1 else "does not hold"


@pytest.fixture
def sweep(quick_path: Path) -> Sweep:
    return fill(sweep_of(quick_path, PLANE, seeds=(0,)), outcome, branches=("sgd",), loss=loss)


def drawn(table: SweepTable, folder: Path, claim: str = "") -> Picture:
    folder.mkdir(exist_ok=True)
    plane, files = plane_of(table.sweep), SavedFigure.inside(folder, "picture", "Title", "")
    if claim:
        return draw_claim(table, plane, claim, files)
    return draw_statistic(table, plane, "loss", "sgd", files)


def colours_in(picture: Picture, region: Region) -> set[str]:
    """The colours of a cell, without its edges."""
    pixels = np.asarray(imread(picture.saved.png))[:, :, :3]
    left, top, width, height = region.box
    rows = slice(int((top + 0.2 * height) * len(pixels)), int((top + 0.8 * height) * len(pixels)))
    across = pixels.shape[1]
    columns = slice(int((left + 0.2 * width) * across), int((left + 0.8 * width) * across))
    found = (255 * pixels[rows, columns].reshape(-1, 3)).round().astype(int)
    return {"#{:02x}{:02x}{:02x}".format(*colour) for colour in found}


def test_a_cell_has_the_colour_of_its_value_on_a_logarithmic_scale(sweep: Sweep) -> None:
    picture = drawn(read_table(sweep), sweep.path.parent)
    regions = {region.point: region for region in picture.regions}
    for point, part in ((0, 0.0), (2, 0.5), (5, 1.0)):
        red, green, blue, _ = colormaps["viridis"](part)
        colour = "#{:02x}{:02x}{:02x}".format(*(round(255 * c) for c in (red, green, blue)))
        assert colour in colours_in(picture, regions[point])
    assert regions[2].said == "training 0.100, 1 seed"
    # Grey with lines: all seeds diverged.
    assert regions[4].said == "1 of 1 seeds diverged"
    assert {"#dcdcdc"} < colours_in(picture, regions[4])


def test_a_cell_has_the_colour_and_the_symbol_of_its_verdict(sweep: Sweep) -> None:
    sweep.points[3].study.write_verdicts([verdict("undecided")])
    (sweep.points[5].study.path / "verdicts.json").unlink()
    (sweep.points[4].study.path / "verdicts.json").unlink()
    picture = drawn(read_table(sweep), sweep.path.parent, "bulk-suffices")
    regions = {region.point: region for region in picture.regions}
    # Blank where not judged, with lines where it diverged.
    assert sorted(regions) == [0, 1, 2, 3, 4]
    for point, fill_ in ((0, GREEN), (2, ORANGE)):
        colours = colours_in(picture, regions[point])
        assert {fill_, "#ffffff"} <= colours
    assert {"#f4e6bd"} < colours_in(picture, regions[3])
    assert regions[0].said == "holds, 1.00 [0.900, 1.10]"
    assert regions[4].said == "not judged, a run diverged"


def test_the_data_beside_it_has_a_row_a_point(sweep: Sweep) -> None:
    table = read_table(sweep)
    values = pd.read_csv(drawn(table, sweep.path.parent).saved.csv)
    assert values["mean"].tolist()[:4] == pytest.approx([0.01, 0.01, 0.1, 0.1])
    assert values["diverged"].tolist() == [0, 0, 0, 0, 1, 0]
    verdicts = pd.read_csv(drawn(table, sweep.path.parent, "bulk-suffices").saved.csv)
    assert verdicts["outcome"].tolist() == ["holds"] * 2 + ["does not hold"] * 4
    assert verdicts["lr"].tolist() == values["lr"].tolist()


def test_regions_lie_inside_the_picture_and_apart(sweep: Sweep) -> None:
    boxes = [region.box for region in drawn(read_table(sweep), sweep.path.parent).regions]
    for left, top, width, height in boxes:
        assert 0 <= left < left + width <= 1
        assert 0 <= top < top + height <= 1
    # Column by column, the second row above the first.
    assert boxes[0][0] == boxes[1][0] < boxes[2][0]
    assert boxes[1][1] + boxes[1][3] == pytest.approx(boxes[0][1])


def test_points_off_a_grid_are_dots_at_their_numbers(quick_path: Path) -> None:
    settings = [{"lr": 10.0**-n, "batch_size": 7 * n * n % 40 + 1} for n in range(8)]
    sweep = fill(
        sweep_of(quick_path, settings, seeds=(0,)), outcome, branches=("sgd",),
        loss=lambda s, _: s["lr"],
    )  # fmt: skip
    table = read_table(sweep)
    for claim in ("", "bulk-suffices"):
        picture = drawn(table, quick_path, claim)
        centres = [region.box[0] + region.box[2] / 2 for region in picture.regions]
        gaps = np.diff(centres)
        assert np.allclose(gaps, gaps[0], atol=1e-6)
        assert gaps[0] < 0
    assert GREEN in colours_in(picture, picture.regions[7])


@pytest.mark.parametrize(("columns", "rows"), few(1, [(1, 1), (30, 1), (3, 25)]))
def test_planes_of_any_shape_can_be_drawn(quick_path: Path, columns: int, rows: int) -> None:
    """The layout warns where there is no room, and warnings are errors."""
    names = ["a setting with a long $name$", "b"]
    settings = grid(**{names[0]: [f"value {n}" for n in range(columns)], names[1]: range(rows)})
    sweep = fill(sweep_of(quick_path, settings, seeds=(0,)), outcome=lambda _: "undecided")
    table = read_table(sweep)
    assert len(drawn(table, quick_path).regions) == len(settings)
    assert len(drawn(table, quick_path, "bulk-suffices").regions) == len(settings)


def test_small_multiples_for_further_settings(quick_path: Path) -> None:
    settings = grid(lr=[0.1, 0.2, 0.3], batch_size=[1, 2, 3], width=[8, 16], loss=["mse", "ce"])
    sweep = fill(sweep_of(quick_path, settings, seeds=(0,)), branches=("sgd",))
    regions = drawn(read_table(sweep), quick_path).regions
    places = {region.point: region.box[:2] for region in regions}
    assert len(set(places.values())) == len(settings)
    # The two losses side by side, the two widths below one another.
    (x, y), (right, same), (left, below) = (places[at] for at in range(3))
    assert right > x
    assert same == y
    assert left == x
    assert below > y


def test_too_many_panels_are_not_drawn(quick_path: Path) -> None:
    settings = [{"a": n, "b": n, "c": n % 49} for n in range(60)]
    sweep = fill(sweep_of(quick_path, settings, seeds=(0,)), branches=("sgd",))
    with pytest.raises(NotDrawableError, match="choose other axes"):
        drawn(read_table(sweep), quick_path)


def test_what_no_run_has_measured_is_not_drawn(quick_path: Path) -> None:
    with pytest.raises(NotDrawableError, match="has measured loss"):
        drawn(read_table(sweep_of(quick_path, PLANE)), quick_path)
