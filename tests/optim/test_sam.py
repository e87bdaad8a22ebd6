from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, AdamW, Optimizer

from tests.optim.resuming import save_and_restore
from thalweg.errors import InvalidInput
from thalweg.loss.objective import Objective
from thalweg.optim.sam import SAM
from thalweg.optim.split import SplitUpdate
from thalweg.spectrum.subspace import Subspace, random_subspace
from thalweg.tracking.source import FixedSubspace
from thalweg.tracking.tracker import SubspaceTracker

INPUTS = torch.linspace(-1, 1, 120).reshape(40, 3).sin()
TARGETS = torch.linspace(1, 0, 80).reshape(40, 2).cos()
# Symmetric, not diagonal: no direction is an eigenvector by its place.
HESSIAN = torch.tensor(
    [[5.0, 1, 0, 0], [1, 3, 0.5, 0], [0, 0.5, 2, 0.1], [0, 0, 0.1, 0.2]]
).double()
START = torch.tensor([1.0, -2.0, 0.5, 3.0]).double()


class Quadratic(nn.Module):
    """(1/2) theta^T H theta, theta in two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(START[:1].clone())
        self.rest = nn.Parameter(START[1:].reshape(3, 1).clone())

    def theta(self) -> Tensor:
        return torch.cat([self.first, self.rest.reshape(-1)])

    def forward(self, scale: Tensor) -> Tensor:
        return scale.mean() * self.theta() @ HESSIAN @ self.theta() / 2


def closure_of(model: Quadratic, optimizer: Optimizer) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(1).double())
        loss.backward()
        return loss

    return closure


def sam_step(theta: Tensor, lr: float, rho: float) -> Tensor:
    gradient = HESSIAN @ theta
    return theta - lr * HESSIAN @ (theta + rho * gradient / gradient.norm())


@pytest.mark.parametrize("foreach", [False, True])
def test_steps_on_a_quadratic_have_their_closed_form(foreach: bool) -> None:
    model, expected = Quadratic(), START
    optimizer = SAM(SGD(model.parameters(), lr=0.1, foreach=foreach), rho=0.3)
    closure = closure_of(model, optimizer)
    for _ in range(5):
        closure()
        optimizer.step(closure)
        expected = sam_step(expected, 0.1, 0.3)
        assert torch.allclose(model.theta(), expected, rtol=1e-12)


def test_adaptive_steps_on_a_quadratic_have_their_closed_form() -> None:
    model, expected = Quadratic(), START
    optimizer = SAM(SGD(model.parameters(), lr=0.1), rho=0.3, adaptive=True)
    closure = closure_of(model, optimizer)
    for _ in range(5):
        closure()
        optimizer.step(closure)
        size, gradient = expected.abs(), HESSIAN @ expected
        perturbation = 0.3 * size**2 * gradient / (size * gradient).norm()
        expected = expected - 0.1 * HESSIAN @ (expected + perturbation)
        assert torch.allclose(model.theta(), expected, rtol=1e-12)


def test_the_norm_is_over_all_groups_and_each_group_keeps_its_learning_rate() -> None:
    model = Quadratic()
    groups = [{"params": [model.first], "lr": 0.2}, {"params": [model.rest], "lr": 0.01}]
    optimizer = SAM(SGD(groups, lr=1.0), rho=0.3)
    closure = closure_of(model, optimizer)
    closure()
    optimizer.step(closure)
    rates = torch.tensor([0.2, 0.01, 0.01, 0.01], dtype=torch.float64)
    moved = START - sam_step(START, 1.0, 0.3)
    assert torch.allclose(model.theta(), START - rates * moved, rtol=1e-12)


def test_momentum_and_decay_are_the_base_optimizers_with_the_perturbed_gradient() -> None:
    model = Quadratic()
    optimizer = SAM(SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.5), rho=0.3)
    closure = closure_of(model, optimizer)
    theta, velocity = START, torch.zeros(4).double()
    for _ in range(3):
        closure()
        optimizer.step(closure)
        velocity = 0.9 * velocity + (theta - sam_step(theta, 1.0, 0.3)) + 0.5 * theta
        theta = theta - 0.1 * velocity
    assert torch.allclose(model.theta(), theta, rtol=1e-12)


def test_a_zero_gradient_gives_no_perturbation() -> None:
    model = Quadratic()
    with torch.no_grad():
        model.first.zero_()
        model.rest.zero_()
    for adaptive in (False, True):
        optimizer = SAM(SGD(model.parameters(), lr=0.1), adaptive=adaptive)
        closure = closure_of(model, optimizer)
        closure()
        assert float(optimizer.step(closure).detach()) == 0
        assert torch.equal(model.theta(), torch.zeros(4).double())


def test_without_a_radius_it_is_the_base_optimizer_bit_for_bit() -> None:
    models = [Quadratic(), Quadratic()]
    plain = AdamW(models[0].parameters(), lr=0.1)
    sam = SAM(AdamW(models[1].parameters(), lr=0.1), rho=0.0)
    closure = closure_of(models[1], sam)
    for _ in range(5):
        closure_of(models[0], plain)()
        plain.step()
        closure()
        sam.step(closure)
        assert torch.equal(models[0].theta(), models[1].theta())


def test_two_steps_by_hand_are_a_step_with_a_closure_and_the_loss_is_the_perturbed_one() -> None:
    by_closure, by_hand = Quadratic(), Quadratic()
    first = SAM(SGD(by_closure.parameters(), lr=0.1), rho=0.3)
    closure = closure_of(by_closure, first)
    closure()
    loss = first.step(closure)
    second = SAM(SGD(by_hand.parameters(), lr=0.1), rho=0.3)
    closure_of(by_hand, second)()
    second.first_step(zero_grad=True)
    assert by_hand.first.grad is None
    gradient = HESSIAN @ START
    perturbed = START + 0.3 * gradient / gradient.norm()
    assert torch.allclose(by_hand.theta(), perturbed, rtol=1e-12)
    assert float(loss.detach()) == pytest.approx(
        float(perturbed @ HESSIAN @ perturbed / 2), rel=1e-12
    )
    with pytest.raises(InvalidInput, match="already perturbed"):
        second.first_step()
    by_hand(torch.ones(1).double()).backward()
    second.second_step(zero_grad=True)
    assert by_hand.first.grad is None
    assert torch.equal(by_closure.theta(), by_hand.theta())


def test_a_closure_that_fails_leaves_theta_as_it_was() -> None:
    model = Quadratic()
    optimizer = SAM(SGD(model.parameters(), lr=0.1))
    closure = closure_of(model, optimizer)
    closure()

    def failing() -> Tensor:
        raise RuntimeError("no loss today")

    with pytest.raises(RuntimeError, match="no loss today"):
        optimizer.step(failing)
    assert torch.equal(model.theta(), START)
    optimizer.step(closure)
    assert torch.allclose(model.theta(), sam_step(START, 0.1, 0.05), rtol=1e-12)


def test_a_parameter_without_a_gradient_stays() -> None:
    model, idle = Quadratic(), nn.Parameter(torch.ones(2))
    optimizer = SAM(SGD([*model.parameters(), idle], lr=0.1), rho=0.3)
    closure = closure_of(model, optimizer)
    closure()
    optimizer.step(closure)
    assert torch.equal(idle, torch.ones(2))
    assert torch.allclose(model.theta(), sam_step(START, 0.1, 0.3), rtol=1e-12)


def test_what_cannot_be_used_is_refused() -> None:
    model = Quadratic()
    base = SGD(model.parameters(), lr=0.1)
    with pytest.raises(InvalidInput, match="no closure; call loss"):
        SAM(base).step()
    with pytest.raises(InvalidInput, match="rho: got -1"):
        SAM(base, rho=-1)
    with pytest.raises(InvalidInput, match="eps: got 0"):
        SAM(base, eps=0)
    for other in (LBFGS(model.parameters()), SAM(base)):
        with pytest.raises(InvalidInput, match="needs no closure"):
            SAM(other)


def lengths_and_cosines(model: nn.Linear, optimizer: SAM, **clearing: bool) -> list[float]:
    """Of the perturbation with the gradient of its own batch, at each step of a training.

    It is trained by step(closure) alone, on another batch each time.
    """
    found: list[float] = []
    for step in range(4):
        rows = (torch.arange(8) * 5 + 3 * step) % 40
        before = model.weight.detach().clone()
        loss = nn.functional.mse_loss(model(INPUTS[rows]), TARGETS[rows])
        (gradient,) = torch.autograd.grad(loss, model.weight)
        moved: list[Tensor] = []

        def closure(rows: Tensor = rows, moved: list[Tensor] = moved) -> Tensor:
            moved.append(model.weight.detach().clone())
            optimizer.zero_grad(**clearing)
            loss = nn.functional.mse_loss(model(INPUTS[rows]), TARGETS[rows])
            loss.backward()
            return loss.detach()

        optimizer.step(closure)
        assert torch.equal(moved[0], before)
        assert len(moved) == 2
        e = (moved[1] - before).flatten()
        found += [float(e.norm()), float(torch.cosine_similarity(e, gradient.flatten(), 0))]
    return found


@pytest.mark.parametrize("clearing", [{}, {"set_to_none": False}])
@pytest.mark.parametrize("touched", ["left alone", "cleared", "zeroed", "clipped"])
def test_a_closure_alone_is_evaluated_at_theta_first(
    clearing: dict[str, bool], touched: str
) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2, bias=False)
    optimizer = SAM(SGD(model.parameters(), lr=0.1), rho=0.5)
    between = {
        "left alone": lambda: None,
        "cleared": optimizer.zero_grad,
        "zeroed": lambda: optimizer.zero_grad(set_to_none=False),
        "clipped": lambda: nn.utils.clip_grad_norm_(model.parameters(), 1e-3),
    }[touched]
    optimizer.register_step_post_hook(lambda *_: between() and None)
    found = lengths_and_cosines(model, optimizer, **clearing)
    assert found == pytest.approx([0.5, 1.0] * 4, rel=1e-5)


def test_backward_before_is_used_and_the_closure_called_once() -> None:
    for set_to_none in (True, False):
        model = Quadratic()
        optimizer, calls = SAM(SGD(model.parameters(), lr=0.1)), []

        def closure(
            model: Quadratic = model,
            optimizer: SAM = optimizer,
            calls: list[int] = calls,
            none: bool = set_to_none,
        ) -> None:
            calls.append(1)
            optimizer.zero_grad(none)
            model(torch.ones(1).double()).backward()

        for _ in range(3):
            closure()
            calls.clear()
            optimizer.step(closure)
            assert len(calls) == 1


def test_a_closure_that_leaves_no_gradient_is_refused_and_a_frozen_model_is_not() -> None:
    model = Quadratic()
    optimizer = SAM(SGD(model.parameters(), lr=0.1))
    with pytest.raises(InvalidInput, match="left no gradient; it must compute the loss and call"):
        optimizer.step(lambda: 1.0)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert optimizer.step(lambda: 1.0) == 1.0
    assert torch.equal(model.theta(), START)


def test_by_hand_a_gradient_is_asked_for_and_hooks_and_schedulers_see_one_step() -> None:
    model, seen = Quadratic(), []
    base = SGD(model.parameters(), lr=0.1)
    optimizer = SAM(base, rho=0.3)
    optimizer.register_step_pre_hook(lambda *_: seen.append(model.theta()))  # type: ignore[arg-type]
    optimizer.register_step_post_hook(lambda *_: seen.append(model.theta()))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)
    with pytest.raises(InvalidInput, match=r"call loss.backward\(\) first"):
        optimizer.first_step()
    closure = closure_of(model, optimizer)
    closure()
    optimizer.first_step()
    closure()
    optimizer.second_step()
    with pytest.raises(InvalidInput, match=r"call loss.backward\(\) first"):
        optimizer.first_step()
    # Warns of a wrong order where it knows of no step.
    scheduler.step()
    assert base.param_groups[0]["lr"] == pytest.approx(0.01)
    assert len(seen) == 2
    assert torch.equal(seen[0], START)
    assert torch.allclose(seen[1], sam_step(START, 0.1, 0.3), rtol=1e-12)


class OldScaler(torch.amp.GradScaler):
    """Has a `scale` of its own, as those of sharded training."""

    def scale(self, outputs: Tensor) -> Tensor:  # type: ignore[override]
        return super().scale(outputs)


@pytest.mark.parametrize("kind", [torch.amp.GradScaler, OldScaler])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("alone", [False, True])
def test_a_scaler_does_not_change_the_length_of_a_step(
    kind: type[torch.amp.GradScaler], scaled: bool, alone: bool
) -> None:
    model = Quadratic()
    optimizer = SAM(SGD(model.parameters(), lr=0.1), rho=0.3)
    scaler, expected = kind("cpu", init_scale=1024.0), START

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(1).double())
        (scaler.scale(loss) if scaled else loss).backward()
        return loss.detach()

    for _ in range(3):
        if alone:
            optimizer.step(closure)
        else:
            optimizer.zero_grad()
            scaler.scale(model(torch.ones(1).double())).backward()
            scaler.step(optimizer, closure)
        if scaled or not alone:
            scaler.update()
        expected = sam_step(expected, 0.1, 0.3)
        assert torch.allclose(model.theta(), expected, rtol=1e-12)
    assert torch.amp.GradScaler.scale.__qualname__ == "GradScaler.scale"


def test_an_infinite_gradient_at_the_perturbed_point_is_left_out_and_the_scaler_told() -> None:
    model = Quadratic()
    optimizer = SAM(SGD(model.parameters(), lr=0.1), rho=0.3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def closure() -> None:
        optimizer.zero_grad()
        scaler.scale(model(torch.full((1,), float("inf")).double())).backward()

    scaler.scale(model(torch.ones(1).double())).backward()
    scaler.step(optimizer, closure)
    scaler.update()
    assert torch.equal(model.theta(), START)
    assert scaler.get_scale() == 512


@pytest.mark.parametrize("adaptive", [False, True])
def test_sparse_gradients_perturb_as_dense_ones(adaptive: bool) -> None:
    ends = []
    for sparse in (False, True):
        table = nn.Embedding(5, 2, sparse=sparse).double()
        with torch.no_grad():
            table.weight.copy_(torch.arange(10).reshape(5, 2).sin())
        optimizer = SAM(SGD(table.parameters(), lr=0.1), rho=0.5, adaptive=adaptive)

        def closure(table: nn.Embedding = table, optimizer: SAM = optimizer) -> None:
            optimizer.zero_grad()
            table(torch.tensor([1, 3, 3])).square().sum().backward()

        for _ in range(2):
            optimizer.step(closure)
        ends.append(table.weight.detach().clone())
    assert torch.allclose(*ends, rtol=1e-12)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def train(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        rows = (torch.arange(10) * 7 + step) % 40

        def closure(rows: Tensor = rows) -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(INPUTS[rows]), TARGETS[rows])
            loss.backward()
            return loss

        closure()
        optimizer.step(closure)  # type: ignore[arg-type]


def test_its_state_can_be_saved_and_restored() -> None:
    rates = iter([0.01, 0.5])  # the saved one holds

    def build() -> tuple[nn.Module, SAM]:
        model = network()
        return model, SAM(AdamW(model.parameters(), lr=next(rates)))

    def step(model: nn.Module, optimizer: SAM, number: int) -> None:
        train(model, optimizer, range(number, number + 1))

    _, restored = save_and_restore(build, step)
    assert restored.param_groups is restored.base_optimizer.param_groups
    assert restored.state is restored.base_optimizer.state


def test_a_scheduler_on_it_changes_the_learning_rate_of_the_base_optimizer() -> None:
    model = network()
    base = SGD(model.parameters(), lr=0.1)
    optimizer = SAM(base)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)
    train(model, optimizer, range(1))
    scheduler.step()
    assert base.param_groups[0]["lr"] == pytest.approx(0.01)


def test_split_one_and_one_is_sam_bit_for_bit() -> None:
    bare, wrapped = network(), network()
    source = SubspaceTracker(Objective(wrapped, nn.MSELoss(), (INPUTS, TARGETS)), 2)
    train(bare, SAM(SGD(bare.parameters(), lr=0.1, momentum=0.9)), range(10))
    split = SplitUpdate(SAM(SGD(wrapped.parameters(), lr=0.1, momentum=0.9)), source)
    train(wrapped, split, range(10))
    assert torch.equal(flat(bare), flat(wrapped))


def test_the_split_is_at_theta_and_its_parts_add_up_to_sams_update() -> None:
    class Watching(FixedSubspace):
        seen: Tensor
        model: nn.Module

        def update(self, theta: Tensor | None = None, vector: Tensor | None = None) -> Subspace:
            assert theta is not None
            self.seen = theta.clone()
            return super().update(theta, vector)

    made = {}
    for scales in ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0)):
        model = network()
        source = Watching(random_subspace(26, 3, 0))
        before = flat(model)
        split = SplitUpdate(SAM(SGD(model.parameters(), lr=0.1), rho=0.5), source, *scales)
        train(model, split, range(1))
        made[scales] = flat(model) - before
        if scales != (1.0, 1.0):
            assert torch.equal(source.seen, before)
    whole, dominant, bulk = made.values()
    assert torch.allclose(dominant + bulk, whole, atol=1e-7)
    space = random_subspace(26, 3, 0)
    assert torch.allclose(dominant, space.project(whole), atol=1e-7)
    assert dominant.norm() > 0


@pytest.mark.parametrize(("dominant", "bulk"), [(0.0, 1.0), (1.0, 0.0)])
def test_split_steps_on_a_quadratic_have_their_closed_form(dominant: float, bulk: float) -> None:
    model, expected = Quadratic(), START
    loss = Objective(model, None, (torch.ones(9).double(),))
    source = SubspaceTracker(loss, 2, exact=True, tolerance=1e-12)
    split = SplitUpdate(SAM(SGD(model.parameters(), lr=0.1), rho=0.3), source, dominant, bulk)
    top = torch.linalg.eigh(HESSIAN).eigenvectors[:, -2:]
    closure = closure_of(model, split)
    for _ in range(4):
        closure()
        split.step(closure)
        update = sam_step(expected, 0.1, 0.3) - expected
        in_top = top @ (top.T @ update)
        expected = expected + dominant * in_top + bulk * (update - in_top)
        assert torch.allclose(model.theta(), expected, rtol=1e-8)
