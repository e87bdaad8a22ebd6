"""Figures of how well a study trains: training loss and test accuracy of the branches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from thalweg.lab.figures.along_steps import Quantity, draw_each_branch, size_of_branches
from thalweg.lab.figures.curves import column
from thalweg.lab.figures.drawing import BAND, LOG_BAND, Look
from thalweg.lab.figures.saving import Curves, Figure, Source

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas


def _loss_curves(source: Source) -> Curves:
    return source.each_branch("loss", column("loss"), logarithmic=True)


def _draw_loss(canvas: Canvas, curves: Curves, look: Look) -> None:
    loss = Quantity("loss", "training loss", logarithmic=True)
    draw_each_branch(canvas, curves, look, loss, late=True)


TRAINING_LOSS = Figure(
    name="training-loss",
    title="Training loss of the branches",
    caption="Full training loss before the branch point and along the branches, which share "
    "checkpoint and mini-batches; early training is left out (the CSV file has it). " + LOG_BAND,
    needs=("loss",),
    curves=_loss_curves,
    draw=_draw_loss,
    size=size_of_branches(),
)


def _accuracy_curves(source: Source) -> Curves:
    return source.each_branch("test_accuracy", column("test_accuracy"))


def _draw_accuracy(canvas: Canvas, curves: Curves, look: Look) -> None:
    accuracy = Quantity("test_accuracy", "test accuracy (%)", scale=100)
    draw_each_branch(canvas, curves, look, accuracy, late=True)


TEST_ACCURACY = Figure(
    name="test-accuracy",
    title="Test accuracy of the branches",
    caption="Accuracy on held-out samples; early training is left out (the CSV file has it). "
    + BAND,
    needs=("test_accuracy",),
    curves=_accuracy_curves,
    draw=_draw_accuracy,
    size=size_of_branches(),
)
