from __future__ import annotations

import torch
from torch import nn
from torch.optim import SGD

from thalweg.optim.sam import SAM
from thalweg.optim.split import SplitUpdate
from thalweg.spectrum.subspace import Subspace
from thalweg.tracking.source import FixedSubspace
from thalweg.tracking.wrapping import unwrapped


def test_the_innermost_optimizer_is_found_in_either_order_of_wrapping() -> None:
    base = SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
    source = FixedSubspace(Subspace(torch.eye(2)[:, :1], torch.ones(1)))
    alone = unwrapped(base)
    assert (alone.base, alone.rho, alone.adaptive) == (base, 0.0, False)
    split = unwrapped(SplitUpdate(base, source))
    assert (split.base, split.rho) == (base, 0.0)
    sam = SAM(base, rho=0.2, adaptive=True)
    for nest in (sam, SplitUpdate(sam, source), SplitUpdate(SplitUpdate(sam, source), source)):
        found = unwrapped(nest)
        assert (found.base, found.rho, found.adaptive) == (base, 0.2, True)
    sam.rho = 0.3
    assert unwrapped(sam).rho == 0.3
