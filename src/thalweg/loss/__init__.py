"""A loss as a function of theta: the protocol, a model with data, a plain function, their sums."""

from __future__ import annotations

from thalweg.loss.chunk_multiplier import ChunkMultiplier
from thalweg.loss.compute_loss import ComputeLoss
from thalweg.loss.function_loss import FunctionLoss
from thalweg.loss.guards.memory import ChunkHalved, GraphsRebuilt
from thalweg.loss.layout import ParameterLayout
from thalweg.loss.lockstep_objective import LockstepObjective
from thalweg.loss.objective import Objective
from thalweg.loss.protocol import Linearization, Loss
from thalweg.loss.reduce import Reduction
from thalweg.loss.weighted_sum import WeightedSum

BlockProducts = ChunkMultiplier  # its name until 0.1

__all__ = [
    "BlockProducts",
    "ChunkHalved",
    "ChunkMultiplier",
    "ComputeLoss",
    "FunctionLoss",
    "GraphsRebuilt",
    "Linearization",
    "LockstepObjective",
    "Loss",
    "Objective",
    "ParameterLayout",
    "Reduction",
    "WeightedSum",
]
