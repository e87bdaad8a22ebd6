"""Methods of neighbouring papers: optimizers, samplers and measurements, until proven."""

from __future__ import annotations

from thalweg.contrib.averaging_period import ConstantPeriod, QuadraticRule
from thalweg.contrib.block_sharpness import BlockSharpness, block_sharpness
from thalweg.contrib.blockwise import PAPER_RATES, OutsideOfBlocks, blockwise_groups
from thalweg.contrib.dion import Dion
from thalweg.contrib.grad_power import GradPower
from thalweg.contrib.local_sgd import LocalSGD
from thalweg.contrib.simulated_workers import SimulatedWorkers
from thalweg.contrib.subspace_langevin import (
    Block,
    SubspaceLangevin,
    coordinate_blocks,
    dominant_and_bulk_blocks,
    eigenvector_blocks,
)
from thalweg.contrib.training_jacobian.jacobian import TrainingJacobian, training_jacobian
from thalweg.contrib.training_jacobian.perturbation_response import (
    PerturbationResponses,
    perturbation_responses,
)
from thalweg.contrib.training_jacobian.singular_spectrum import (
    SingularSpectrum,
    flattest_directions,
    singular_spectrum,
)
from thalweg.contrib.training_jacobian.training_run import TrainingRun, trained_parameters

__all__ = [
    "PAPER_RATES",
    "Block",
    "BlockSharpness",
    "ConstantPeriod",
    "Dion",
    "GradPower",
    "LocalSGD",
    "OutsideOfBlocks",
    "PerturbationResponses",
    "QuadraticRule",
    "SimulatedWorkers",
    "SingularSpectrum",
    "SubspaceLangevin",
    "TrainingJacobian",
    "TrainingRun",
    "block_sharpness",
    "blockwise_groups",
    "coordinate_blocks",
    "dominant_and_bulk_blocks",
    "eigenvector_blocks",
    "flattest_directions",
    "perturbation_responses",
    "singular_spectrum",
    "trained_parameters",
    "training_jacobian",
]
