"""A user's plugin: a data set, a model with dropout and batch norm, and two probes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from thalweg.measure.probes import probe
from thalweg.measure.step_state import StepState
from thalweg.problems import InputShape, Samples
from thalweg.registry import datasets, models
from thalweg.settings import Settings

if TYPE_CHECKING:
    from torch import nn


@datasets.register("waves")
class Waves(Settings):
    """A regression: two phases of a sine from six numbers; no classes."""

    count: int = 120

    def build(self) -> Samples:
        generator = np.random.default_rng(0)
        inputs = generator.normal(size=(self.count, 6))
        mix = generator.normal(size=(6, 2))
        return Samples(inputs, np.sin(inputs @ mix), num_classes=None)


@models.register("noisy-mlp")
class NoisyMLP(Settings):
    """Draws random numbers (dropout) and has buffers (batch norm) in training."""

    width: int = 12

    def build(self, inputs: InputShape, outputs: int) -> nn.Module:
        from torch import nn

        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(inputs.size, self.width),
            nn.BatchNorm1d(self.width),
            nn.Tanh(),
            nn.Dropout(0.2),
            nn.Linear(self.width, outputs),
        )


@probe("theta_norm", ["theta_norm"])
def theta_norm(state: StepState) -> Mapping[str, float]:
    """The length of theta."""
    return {"theta_norm": float(state.theta.norm())}


@probe("broken", ["broken"])
def broken(state: StepState) -> Mapping[str, float]:
    """A probe with a mistake, from step 4 on."""
    return {"broken": 1 / max(0, 4 - state.step)}
