"""Optimizers: split an update into its dominant and bulk part; SAM; several as one; local SGD."""

from __future__ import annotations

from thalweg.optim.averaging_period import ConstantPeriod, QuadraticRule
from thalweg.optim.blockwise import PAPER_RATES, blockwise_groups
from thalweg.optim.closure import needs_closure
from thalweg.optim.combined import Combined
from thalweg.optim.dion import Dion
from thalweg.optim.grad_power import GradPower
from thalweg.optim.local_sgd import LocalSGD
from thalweg.optim.lockstep_sgd import LockstepSGD
from thalweg.optim.sam import SAM
from thalweg.optim.simulated_workers import SimulatedWorkers
from thalweg.optim.split import SplitUpdate
from thalweg.optim.subspace_langevin import (
    Block,
    SubspaceLangevin,
    coordinate_blocks,
    dominant_and_bulk_blocks,
    eigenvector_blocks,
)

__all__ = [
    "PAPER_RATES",
    "SAM",
    "Block",
    "Combined",
    "ConstantPeriod",
    "Dion",
    "GradPower",
    "LocalSGD",
    "LockstepSGD",
    "QuadraticRule",
    "SimulatedWorkers",
    "SplitUpdate",
    "SubspaceLangevin",
    "blockwise_groups",
    "coordinate_blocks",
    "dominant_and_bulk_blocks",
    "eigenvector_blocks",
    "needs_closure",
]
