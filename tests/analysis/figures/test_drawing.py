from __future__ import annotations

import itertools

import pytest
from matplotlib.figure import Figure

from thalweg.analysis.figures import drawing


@pytest.mark.parametrize("height", [1e-2, 1.0, 1e13])
def test_the_label_of_a_line_that_ends_early_stays_below_the_title(height: float) -> None:
    figure = Figure(figsize=(2.4, 2.0), layout="constrained")
    axes = figure.subplots()
    axes.set_title("SGD-faster")
    axes.set(xlim=(0, 100), ylim=(1e-3, 2e13), yscale="log")
    axes.plot([30, 40], [1e-2, height])
    drawing.label_inside(axes, 40, ("SGD-faster", height, "#0072b2"))
    figure.draw_without_rendering()
    (label,) = axes.texts
    assert label.get_window_extent().y1 <= axes.get_window_extent().y1
    assert not label.get_window_extent().overlaps(axes.title.get_window_extent())


def test_labels_at_the_ends_of_lines_do_not_overlap() -> None:
    canvas = Figure(figsize=(3.4, 2.3), layout="constrained")
    axes = canvas.subplots()
    axes.plot([0, 1], [0, 1])
    drawing.label_ends(axes, [("a", 0.50, "k"), ("b", 0.51, "k"), ("c", 0.52, "k")])
    canvas.draw_without_rendering()
    boxes = sorted((text.get_window_extent() for text in axes.texts), key=lambda box: box.y0)
    assert all(low.y1 <= high.y0 + 2 for low, high in itertools.pairwise(boxes))


def test_labels_stay_beside_their_panel_as_long_as_there_is_room() -> None:
    assert drawing.kept_between([-20.0, -10.0, 50.0], 0.0, 60.0, 10.0) == [0.0, 10.0, 50.0]
    assert drawing.kept_between([50.0, 60.0, 70.0], 0.0, 60.0, 10.0) == [40.0, 50.0, 60.0]


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ([0.0, 100.0], [0.0, 100.0]),
        ([50.0, 50.0], [45.0, 55.0]),
        ([0.0, 1.0, 200.0], [-4.5, 5.5, 200.0]),
        ([], []),
    ],
)
def test_positions_move_apart_as_little_as_needed(
    wanted: list[float], expected: list[float]
) -> None:
    assert drawing.spread_apart(wanted, 10.0) == pytest.approx(expected)
