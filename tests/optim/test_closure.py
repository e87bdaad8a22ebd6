from __future__ import annotations

import torch
from torch import nn
from torch.optim import LBFGS, SGD

from thalweg.optim.closure import needs_closure
from thalweg.optim.combined import Combined
from thalweg.optim.sam import SAM
from thalweg.optim.split import SplitUpdate
from thalweg.spectrum.subspace import random_subspace
from thalweg.tracking.source import FixedSubspace


def test_sam_and_lbfgs_need_a_closure_also_inside_of_a_split() -> None:
    parameter = nn.Parameter(torch.ones(3))
    source = FixedSubspace(random_subspace(3, 1, 0))
    plain = SGD([parameter], lr=0.1)
    for optimizer, needed in (
        (plain, False),
        (Combined([plain]), False),
        (LBFGS([parameter]), True),
        (SAM(plain), True),
    ):
        assert needs_closure(optimizer) == needed
        assert needs_closure(SplitUpdate(optimizer, source)) == needed
