from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, Adam

from tests.optim.wrapping_of_others import Delegating, Hidden, Prepared, PublicSAM
from thalweg.contrib.grad_power import GradPower
from thalweg.errors import InvalidInput
from thalweg.optim.combined import Combined
from thalweg.optim.sam import SAM
from thalweg.optim.split import SplitUpdate
from thalweg.spectrum.subspace import Subspace, random_subspace
from thalweg.tracking.preconditioner import has_preconditioner, preconditioner
from thalweg.tracking.source import FixedSubspace
from thalweg.tracking.wrapping import needs_closure, stepping, unwrapped


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


def test_sam_and_lbfgs_need_a_closure_also_inside_of_others() -> None:
    parameter = nn.Parameter(torch.ones(3))
    source = FixedSubspace(random_subspace(3, 1, 0))
    plain = SGD([parameter], lr=0.1)
    for optimizer, needed in (
        (plain, False),
        (GradPower(plain), False),
        (Combined([plain]), False),
        (LBFGS([parameter]), True),
        (SAM(plain), True),
    ):
        split = SplitUpdate(optimizer, source)
        assert needs_closure(optimizer) == needs_closure(split) == split.needs_closure == needed


def test_the_diagonal_of_adam_is_found_inside_of_what_wraps_it() -> None:
    parameter = nn.Parameter(torch.ones(3))
    adam = Adam([parameter])
    split = SplitUpdate(adam, FixedSubspace(random_subspace(3, 1, 0)))
    parameter.grad = torch.arange(3.0)
    split.step()
    assert has_preconditioner(split)
    assert torch.equal(preconditioner(split), preconditioner(adam))
    # Powers of its gradient are something else than Adam.
    assert not has_preconditioner(GradPower(adam))


def test_wrappers_of_other_libraries_are_looked_through() -> None:
    base = SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
    sam = SAM(base, rho=0.2)
    for around in (Prepared, Delegating):
        found = unwrapped(around(sam))  # type: ignore[arg-type]
        assert (found.base, found.rho, found.needs_closure) == (base, 0.2, True)
        assert unwrapped(SAM(around(base), rho=0.1)).base is base  # type: ignore[arg-type]
    public = PublicSAM([nn.Parameter(torch.zeros(2))], SGD, rho=0.3, lr=0.1)
    assert unwrapped(public).base is public.base_optimizer
    assert unwrapped(public).rho == 0.3


def test_the_steps_that_move_the_parameters_are_those_of_what_is_around_and_still_in_use() -> None:
    base = SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
    assert stepping(base) == [base]
    sam = SAM(base)
    power = GradPower(base)
    combined = Combined([base])
    assert set(stepping(base)) == {base, sam, power, combined}
    around = SAM(combined)
    assert set(stepping(base)) == {base, sam, power, combined, around}
    assert stepping(sam) == [sam]
    del sam, power, around
    gc.collect()
    assert set(stepping(base)) == {base, combined}


@pytest.mark.parametrize("around", [Prepared, Delegating, Hidden])
def test_what_runs_no_hooks_is_represented_by_what_is_inside(around: type) -> None:
    base = SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
    sam = SAM(base)
    assert stepping(around(sam)) == [sam]
    assert stepping(Prepared(around(base)))[0] is base
    outer = SAM(around(base))
    assert outer in stepping(outer)


def test_what_hides_its_steps_is_refused() -> None:
    class Bare(SGD):
        def __init__(self, parameters: list[nn.Parameter]) -> None:
            self.param_groups = [{"params": parameters}]

    with pytest.raises(InvalidInput, match=r"got 'Bare'.*give the torch.optim.Optimizer inside"):
        stepping(Bare([nn.Parameter(torch.zeros(2))]))
