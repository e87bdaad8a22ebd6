"""An optimizer around another shares its groups and state, whoever puts what in their place."""

from __future__ import annotations

from collections import defaultdict

import torch

from thalweg.optim.wrapper import Wrapper


def wrapped() -> tuple[torch.optim.Optimizer, Wrapper]:
    inner = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9)
    return inner, Wrapper(inner)


def test_groups_and_state_are_the_inner_ones_also_when_the_state_is_replaced() -> None:
    inner, outer = wrapped()
    assert outer.param_groups is inner.param_groups
    assert outer.state is inner.state
    shared: defaultdict = defaultdict(dict)
    inner.state = shared
    assert outer.state is shared
    outer.state = other = defaultdict(dict)
    assert inner.state is other


def test_wrapping_leaves_the_state_of_an_optimizer_that_has_stepped() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    inner = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    parameter.grad = torch.ones(2)
    inner.step()
    outer = Wrapper(inner)
    assert torch.equal(outer.state[parameter]["momentum_buffer"], torch.ones(2))


def test_a_restored_state_and_its_groups_are_shared_too() -> None:
    inner, outer = wrapped()
    outer.load_state_dict(inner.state_dict())
    assert outer.param_groups is inner.param_groups
    assert outer.state is inner.state


def test_gradients_are_cleared_through_it() -> None:
    inner, outer = wrapped()
    (parameter,) = inner.param_groups[0]["params"]
    parameter.grad = torch.ones(2)
    outer.zero_grad()
    assert parameter.grad is None
