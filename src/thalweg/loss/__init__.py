"""A loss as a function of theta: model, data and how a chunk of them is evaluated."""

from __future__ import annotations

from thalweg.loss.guards.memory import ChunkHalved
from thalweg.loss.layout import ParameterLayout
from thalweg.loss.lockstep_objective import LockstepObjective
from thalweg.loss.multiplication import BlockProducts
from thalweg.loss.objective import Objective

__all__ = [
    "BlockProducts",
    "ChunkHalved",
    "LockstepObjective",
    "Objective",
    "ParameterLayout",
]
