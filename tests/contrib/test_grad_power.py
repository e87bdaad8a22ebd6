from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, AdamW, Muon, Optimizer

from tests.optim.resuming import save_and_restore
from thalweg.contrib.grad_power import GradPower
from thalweg.errors import InvalidInput
from thalweg.optim.combined import Combined
from thalweg.optim.sam import SAM
from thalweg.optim.split import SplitUpdate
from thalweg.optim.stability import stability_threshold
from thalweg.spectrum.subspace import random_subspace
from thalweg.tracking.source import FixedSubspace
from thalweg.tracking.wrapping import unwrapped

INPUTS = torch.linspace(-1, 1, 120).reshape(40, 3).sin()
TARGETS = torch.linspace(1, 0, 80).reshape(40, 2).cos()
GRADIENT = [2.0, -0.5, 0.0, -3e-5, 1.0]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def backward(model: nn.Module, step: int) -> Tensor:
    rows = (torch.arange(10) * 7 + step) % 40
    model.zero_grad()
    loss = nn.functional.mse_loss(model(INPUTS[rows]), TARGETS[rows])
    loss.backward()
    return loss


def power_of_all(model: nn.Module, power: float) -> None:
    for p in model.parameters():
        assert p.grad is not None
        p.grad = p.grad.sign() * p.grad.abs() ** power


def parts(model: nn.Module) -> list[Optimizer]:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    return [Muon(matrices, lr=0.02), AdamW(vectors, lr=0.01)]


@pytest.mark.parametrize("power", [1.2, 0.5, 3.0])
@pytest.mark.parametrize("eps", [0.0, 1e-8, 1e-3])
def test_the_gradient_is_raised_to_the_power_elementwise(power: float, eps: float) -> None:
    weight = nn.Parameter(torch.zeros(5).double())
    weight.grad = torch.tensor(GRADIENT).double()
    expected = np.array([float(torch.tensor(g)) for g in GRADIENT])
    expected = np.sign(expected) * (np.abs(expected) + eps) ** power
    GradPower(SGD([weight], lr=1.0), power, eps).step()
    assert np.allclose(-weight.detach().numpy(), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["sgd", "adam", "combined"])
def test_power_one_is_the_bare_optimizer_bit_for_bit(kind: str) -> None:
    build: dict[str, Callable[[nn.Module], Optimizer]] = {
        "sgd": lambda model: SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1),
        "adam": lambda model: Adam(model.parameters(), lr=0.1),
        "combined": lambda model: Combined(parts(model)),
    }
    bare, wrapped = network(), network()
    plain, powered = build[kind](bare), GradPower(build[kind](wrapped), power=1.0, eps=0.1)
    for step in range(5):
        backward(bare, step)
        plain.step()
        backward(wrapped, step)
        powered.step()
        assert torch.equal(flat(bare), flat(wrapped))


@pytest.mark.parametrize("placed", ["around", "inside"])
def test_with_several_optimizers_each_sees_the_powers(placed: str) -> None:
    by_hand, powered = network(), network()
    separate = parts(by_hand)
    if placed == "around":
        optimizer: Optimizer = GradPower(Combined(parts(powered)))
    else:
        optimizer = Combined([GradPower(part) for part in parts(powered)])
    for step in range(5):
        backward(by_hand, step)
        power_of_all(by_hand, 1.2)
        for part in separate:
            part.step()
        backward(powered, step)
        optimizer.step()
    assert torch.allclose(flat(by_hand), flat(powered), atol=1e-7)
    assert sum(bool(state) for state in optimizer.state.values()) == 4


@pytest.mark.parametrize("placed", ["alone", "around", "inside"])
def test_its_state_can_be_saved_and_restored(placed: str) -> None:
    def build() -> tuple[nn.Module, Optimizer]:
        model = network()
        if placed == "alone":
            return model, GradPower(AdamW(model.parameters(), lr=0.01))
        if placed == "around":
            return model, GradPower(Combined(parts(model)))
        return model, Combined([GradPower(part) for part in parts(model)])

    def step(model: nn.Module, optimizer: Optimizer, number: int) -> None:
        backward(model, number)
        optimizer.step()

    save_and_restore(build, step)


def test_it_takes_over_the_state_and_the_groups_of_an_optimizer_that_has_made_steps() -> None:
    model = network()
    base = Adam(model.parameters(), lr=0.01)
    backward(model, 0)
    base.step()
    optimizer = GradPower(base)
    assert optimizer.state is base.state
    assert optimizer.param_groups is base.param_groups
    assert float(optimizer.state[next(model.parameters())]["step"]) == 1
    optimizer.param_groups[0]["lr"] = 0.5
    assert base.param_groups[0]["lr"] == 0.5


def test_a_closure_is_evaluated_once_and_its_gradient_is_the_one_transformed() -> None:
    by_hand, model = network(), network()
    loss = backward(by_hand, 0)
    power_of_all(by_hand, 1.2)
    SGD(by_hand.parameters(), lr=0.1).step()
    calls: list[Tensor] = []

    def closure() -> Tensor:
        calls.append(backward(model, 0))
        return calls[-1]

    returned = GradPower(SGD(model.parameters(), lr=0.1)).step(closure)
    assert torch.equal(returned, loss)
    assert len(calls) == 1
    assert torch.allclose(flat(by_hand), flat(model), atol=1e-8)


def test_the_gradients_are_as_before_after_a_step_even_one_that_fails() -> None:
    class Failing(SGD):
        def step(self, closure: object = None) -> None:  # type: ignore[override]
            raise RuntimeError("no step today")

    model = network()
    backward(model, 0)
    before = [p.grad for p in model.parameters()]
    values = [gradient.clone() for gradient in before if gradient is not None]
    with pytest.raises(RuntimeError, match="no step today"):
        GradPower(Failing(model.parameters(), lr=0.1)).step()
    GradPower(SGD(model.parameters(), lr=0.1)).step()
    for p, gradient, value in zip(model.parameters(), before, values, strict=True):
        assert p.grad is gradient
        assert torch.equal(value, p.grad)


def test_a_parameter_without_a_gradient_stays() -> None:
    idle, moving = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(1))
    optimizer = GradPower(SGD([idle, moving], lr=1.0), 2.0)
    optimizer.step()
    moving.grad = torch.tensor([-3.0])
    optimizer.step()
    assert idle.tolist() == [1.0, 1.0]
    assert moving.tolist() == [10.0]
    assert idle.grad is None


@pytest.mark.parametrize(("dominant", "bulk"), [(1.0, 0.0), (0.25, 2.0)])
def test_a_split_scales_the_parts_of_its_update(dominant: float, bulk: float) -> None:
    alone, inside = network(), network()
    before, space = flat(alone), random_subspace(26, 3, 0)
    backward(alone, 0)
    GradPower(SGD(alone.parameters(), lr=0.1)).step()
    proposed = flat(alone) - before
    base = GradPower(SGD(inside.parameters(), lr=0.1))
    split = SplitUpdate(
        base, FixedSubspace(space), dominant, bulk, parameters=list(inside.parameters())
    )
    backward(inside, 0)
    split.step()
    in_space = space.project(proposed)
    expected = before + dominant * in_space + bulk * (proposed - in_space)
    assert torch.allclose(flat(inside), expected, atol=1e-7)


def test_sam_around_it_raises_the_gradient_at_the_perturbed_point() -> None:
    curvatures = torch.tensor([2.0, 0.5]).double()
    start = torch.tensor([3.0, -1.0]).double()
    theta = nn.Parameter(start.clone())
    optimizer = SAM(GradPower(SGD([theta], lr=0.1), power=1.5), rho=0.2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (curvatures * theta.square()).sum() / 2
        loss.backward()
        return loss

    closure()
    optimizer.step(closure)
    gradient = curvatures * start
    perturbed = curvatures * (start + 0.2 * gradient / gradient.norm())
    expected = start - 0.1 * perturbed.sign() * perturbed.abs() ** 1.5
    assert torch.allclose(theta, expected, rtol=1e-12)


def test_the_stability_threshold_of_the_wrapped_optimizer_is_not_taken_for_its_own() -> None:
    optimizer = GradPower(SGD(network().parameters(), lr=0.1))
    assert unwrapped(optimizer).base is optimizer
    assert stability_threshold(optimizer).value is None


def test_what_cannot_be_used_is_refused() -> None:
    model = network()
    base = SGD(model.parameters(), lr=0.1)
    for power in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InvalidInput, match="power: got"):
            GradPower(base, power)
    with pytest.raises(InvalidInput, match="eps: got -1"):
        GradPower(base, eps=-1.0)
    with pytest.raises(InvalidInput, match="wrap SAM around GradPower"):
        GradPower(SAM(base))
    with pytest.raises(InvalidInput, match="LBFGS"):
        GradPower(LBFGS(model.parameters()))
    table = nn.Embedding(3, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(InvalidInput, match=r"sparse_coo.*dense gradients"):
        GradPower(SGD(table.parameters(), lr=0.1)).step()
