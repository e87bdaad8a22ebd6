"""One run: the trunk of a seed, or a branch from its last checkpoint."""

from __future__ import annotations

from thalweg.lab.training.building import (
    Setup,
    build_setup,
    make_objective,
    number_of_directions,
    top_eigenvalues,
)
from thalweg.lab.training.loop import Run

__all__ = [
    "Run",
    "Setup",
    "build_setup",
    "make_objective",
    "number_of_directions",
    "top_eigenvalues",
]
