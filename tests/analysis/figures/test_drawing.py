from __future__ import annotations

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
