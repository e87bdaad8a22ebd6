"""What is the same of a model in parts and of one in one piece: vectors to multiply, projectors."""

from __future__ import annotations

import torch
from torch import Tensor

from thalweg.loss.objective import Objective
from thalweg.sharding import whole
from thalweg.spectrum.subspace import Subspace


def block_like(loss: Objective) -> Tensor:
    """The same columns (P, 3) in one process and in many."""
    generator = torch.Generator().manual_seed(3)
    kind = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
    rows = torch.randn(3, loss.num_parameters, **kind)
    return (rows if loss.sharding is None else loss.sharding.part_of(rows)).T


def projector(space: Subspace) -> Tensor:
    basis = whole(space.basis.T)
    return basis.T @ basis
