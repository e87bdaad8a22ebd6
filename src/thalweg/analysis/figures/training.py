"""Figures of how well a study trains: training loss and test accuracy of the branches."""

from __future__ import annotations

from thalweg.analysis.figures.along_steps import Quantity, figure_of_branches
from thalweg.analysis.figures.drawing import BAND, LOG_BAND

TRAINING_LOSS = figure_of_branches(
    "training-loss",
    "Training loss of the branches",
    "Full training loss before the branch point and along the branches, which share checkpoint and "
    "mini-batches; early training is left out (the CSV file has it). " + LOG_BAND,
    Quantity("loss", "training loss", logarithmic=True),
    geometric=True,
    late=True,
)

TEST_ACCURACY = figure_of_branches(
    "test-accuracy",
    "Test accuracy of the branches",
    "Accuracy on held-out samples; early training is left out (the CSV file has it). " + BAND,
    Quantity("test_accuracy", "test accuracy (%)", scale=100),
    late=True,
)
