from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Muon, Optimizer

from tests.optim.resuming import save_and_restore
from thalweg.errors import InvalidInput, ThalwegError
from thalweg.loss.objective import Objective
from thalweg.optim.split import SplitUpdate
from thalweg.spectrum.subspace import Subspace, random_subspace
from thalweg.tracking.source import FixedSubspace, Split
from thalweg.tracking.tracker import SubspaceTracker

INPUTS = torch.linspace(-1, 1, 120).reshape(40, 3).sin()
TARGETS = torch.linspace(1, 0, 80).reshape(40, 2).cos()

BASES: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "SGD with momentum": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "Adam": lambda p: Adam(p, lr=0.01),
    "AdamW": lambda p: AdamW(p, lr=0.01, weight_decay=0.1),
    "Muon": lambda p: Muon(p, lr=0.02),
}


def network(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4, bias=bias), nn.Tanh(), nn.Linear(4, 2, bias=bias))


def objective(model: nn.Module) -> Objective:
    return Objective(model, nn.MSELoss(), (INPUTS, TARGETS), vectorize_up_to=0)


def tracker(model: nn.Module) -> SubspaceTracker:
    return SubspaceTracker(objective(model), 2)


def backward(model: nn.Module, step: int) -> None:
    rows = torch.arange(10) * 7 + step
    model.zero_grad()
    nn.functional.mse_loss(model(INPUTS[rows % 40]), TARGETS[rows % 40]).backward()


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@pytest.mark.parametrize("name", BASES)
def test_one_and_one_is_the_bare_optimizer_bit_for_bit(name: str) -> None:
    bare, wrapped = (network(bias=name != "Muon") for _ in range(2))
    alone = BASES[name](list(bare.parameters()))
    split = SplitUpdate(BASES[name](list(wrapped.parameters())), tracker(wrapped))
    for step in range(20):
        backward(bare, step)
        backward(wrapped, step)
        alone.step()
        split.step()
        assert torch.equal(flat(bare), flat(wrapped))
        assert split.split is None
    with pytest.raises(InvalidInput, match="no subspace yet"):
        _ = split.source.subspace


@pytest.mark.parametrize("name", BASES)
def test_the_update_made_is_the_scaled_parts_of_the_update_proposed(name: str) -> None:
    model = network(bias=name != "Muon")
    split = SplitUpdate(BASES[name](list(model.parameters())), tracker(model), 0.25, 2.0)
    for step in range(3):
        before = flat(model)
        backward(model, step)
        split.step()
        assert split.split is not None
        assert split.proposed is not None
        parts = split.split.dominant + split.split.bulk
        assert torch.allclose(parts, split.proposed, atol=1e-7)
        made = 0.25 * split.split.dominant + 2 * split.split.bulk
        assert torch.allclose(flat(model) - before, made, atol=1e-7)
        space = split.source.subspace
        assert torch.allclose(split.split.dominant, space.project(split.proposed), atol=1e-6)


@pytest.mark.parametrize("name", BASES)
def test_the_dominant_and_the_bulk_update_add_up_to_the_full_one(name: str) -> None:
    made = {}
    for scales in ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0)):
        model = network(bias=name != "Muon")
        split = SplitUpdate(BASES[name](list(model.parameters())), tracker(model), *scales)
        before = flat(model)
        backward(model, 0)
        split.step()
        made[scales] = flat(model) - before
    assert torch.allclose(made[1.0, 0.0] + made[0.0, 1.0], made[1.0, 1.0], atol=1e-7)
    assert made[1.0, 0.0].norm() > 0
    assert made[0.0, 1.0].norm() > 0


class Valley(nn.Module):
    """(1/2) theta^T diag(h) theta."""

    def __init__(self, curvatures: Tensor) -> None:
        super().__init__()
        self.curvatures = curvatures
        self.theta = nn.Parameter(torch.ones_like(curvatures))

    def forward(self, scale: Tensor) -> Tensor:
        return scale.mean() * (self.curvatures * self.theta.square()).sum() / 2


@pytest.mark.parametrize(("dominant", "bulk"), [(0.0, 1.0), (1.0, 0.0), (0.5, 2.0)])
def test_split_gradient_descent_on_a_quadratic_has_its_closed_form(
    dominant: float, bulk: float
) -> None:
    curvatures = torch.tensor([9.0, 5.0, 0.5, 0.3, 0.1], dtype=torch.float64)
    model = Valley(curvatures)
    loss = Objective(model, None, (torch.ones(9, dtype=torch.float64),))
    source = SubspaceTracker(loss, 2, exact=True, tolerance=1e-12)
    split = SplitUpdate(SGD(model.parameters(), lr=0.1), source, dominant, bulk)
    for _ in range(7):
        split.zero_grad()
        model(torch.ones(1, dtype=torch.float64)).backward()
        split.step()
    scales = torch.tensor([dominant, dominant, bulk, bulk, bulk], dtype=torch.float64)
    assert torch.allclose(model.theta.detach(), (1 - 0.1 * scales * curvatures) ** 7, atol=1e-12)


def test_the_optimizers_own_state_sees_the_gradients_as_they_are() -> None:
    model = network()
    split = SplitUpdate(SGD(model.parameters(), lr=0.1, momentum=0.9), tracker(model), 0.0, 0.0)
    before = flat(model)
    total = torch.zeros_like(before)
    for step in range(3):
        backward(model, step)
        gradient = torch.cat([p.grad.reshape(-1) for p in model.parameters()])  # type: ignore[union-attr]
        total = 0.9 * total + gradient
        split.step()
    assert torch.equal(flat(model), before)
    momentum = [split.state[p]["momentum_buffer"].reshape(-1) for p in model.parameters()]
    assert torch.allclose(torch.cat(momentum), total, atol=1e-7)


@pytest.mark.parametrize("name", BASES)
def test_its_state_can_be_saved_and_restored(name: str) -> None:
    def build() -> tuple[nn.Module, SplitUpdate]:
        model = network(bias=name != "Muon")
        source = FixedSubspace(random_subspace(flat(model).numel(), 3, 0))
        base = BASES[name](list(model.parameters()))
        return model, SplitUpdate(base, source, 0.0, 1.0, parameters=list(model.parameters()))

    def step(model: nn.Module, optimizer: SplitUpdate, number: int) -> None:
        backward(model, number)
        optimizer.step()

    _, restored = save_and_restore(build, step)
    assert restored.param_groups is restored.optimizer.param_groups


@pytest.mark.parametrize("on", ["the wrapper", "the wrapped"])
def test_a_scheduler_on_either_changes_the_learning_rate_of_both(on: str) -> None:
    model = network()
    base = SGD(model.parameters(), lr=0.1)
    split = SplitUpdate(base, tracker(model), 0.0, 1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(split if on == "the wrapper" else base, 1, 0.1)
    for step in range(2):
        backward(model, step)
        split.step()
        scheduler.step()
    assert base.param_groups[0]["lr"] == pytest.approx(0.001)
    assert split.param_groups[0]["lr"] == pytest.approx(0.001)


def test_a_closure_is_evaluated_with_gradients_and_its_loss_returned() -> None:
    model = network()
    for base in (SGD(model.parameters(), lr=0.1), torch.optim.LBFGS(model.parameters(), lr=0.1)):
        split = SplitUpdate(base, tracker(model), 0.0, 1.0)

        def closure(split: SplitUpdate = split) -> Tensor:
            split.zero_grad()
            loss = nn.functional.mse_loss(model(INPUTS), TARGETS)
            loss.backward()
            return loss

        expected = nn.functional.mse_loss(model(INPUTS), TARGETS).item()
        assert split.step(closure).item() == pytest.approx(expected)
        assert split.split is not None
        assert split.split.bulk.any()


def test_parameters_outside_of_theta_take_their_whole_update() -> None:
    model = network()
    loss = Objective(model, nn.MSELoss(), (INPUTS, TARGETS), parameters=["0.*"])
    seen: list[Tensor] = []

    class Watching(SubspaceTracker):
        def update(self, theta: Tensor | None = None, vector: Tensor | None = None) -> Subspace:
            seen.append(model[2].weight.detach().clone())
            return super().update(theta, vector)

    split = SplitUpdate(SGD(model.parameters(), lr=0.1), Watching(loss, 2), 0.0, 0.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    backward(model, 0)
    split.step()
    after = dict(model.named_parameters())
    assert torch.equal(after["0.weight"], before["0.weight"])
    grad = model[2].weight.grad
    assert isinstance(grad, Tensor)
    assert torch.equal(after["2.weight"], before["2.weight"] - 0.1 * grad)
    # The subspace is that of the point before the step in these parameters too.
    assert torch.equal(seen[0], before["2.weight"])


def test_an_optimizer_of_other_parameters_is_refused() -> None:
    with pytest.raises(InvalidInput, match="build both from one model"):
        SplitUpdate(SGD(network().parameters(), lr=0.1), tracker(network()))


@pytest.mark.parametrize("fails", ["update", "split", "inside"])
@pytest.mark.parametrize("name", ["Adam", "SGD with momentum"])
def test_a_step_that_fails_leaves_parameters_and_state_as_they_were(name: str, fails: str) -> None:
    class Stopping(FixedSubspace):
        now = False

        def update(self, theta: Any = None, vector: Any = None) -> Subspace:
            if self.now and fails == "update":
                raise KeyboardInterrupt("no step today")
            return super().update(theta, vector)

        def split(self, vector: Tensor) -> Split:
            if self.now and fails == "split":
                raise KeyboardInterrupt("no step today")
            return super().split(vector)

    def build() -> tuple[nn.Sequential, SplitUpdate]:
        model = network()
        source = Stopping(random_subspace(16, 2, 0))
        base = BASES[name](list(model.parameters()))
        if fails == "inside":
            base.register_step_post_hook(lambda *_: 1 / (not source.now) and None)
        return model, SplitUpdate(base, source, 0.0, 1.0, parameters=list(model[0].parameters()))

    (model, split), (twin, undisturbed) = build(), build()
    for step in range(3):
        for net, optimizer in ((model, split), (twin, undisturbed)):
            backward(net, step)
            optimizer.step()
        before = flat(model)
        backward(model, step + 1)
        split.source.now = True  # type: ignore[attr-defined]
        with pytest.raises((KeyboardInterrupt, ZeroDivisionError)):
            split.step()
        split.source.now = False  # type: ignore[attr-defined]
        assert torch.equal(flat(model), before)
        for one, other in zip(model.parameters(), twin.parameters(), strict=True):
            assert split.state[one].keys() == undisturbed.state[other].keys()
            for key, value in split.state[one].items():
                assert torch.equal(value, undisturbed.state[other][key]), key


def test_a_failing_first_step_leaves_no_state() -> None:
    model = network()
    split = SplitUpdate(Adam(model.parameters()), tracker(model), 0.0, 1.0)
    split.source.update = lambda *_: 1 / 0  # type: ignore[method-assign]
    backward(model, 0)
    with pytest.raises(ZeroDivisionError):
        split.step()
    assert not split.state
    assert torch.equal(flat(model), flat(network()))


def test_a_nan_in_the_watched_data_moves_nothing() -> None:
    model = network()
    watched = INPUTS.clone()
    watched[0, 0] = float("nan")
    source = SubspaceTracker(Objective(model, nn.MSELoss(), (watched, TARGETS)), 2)
    split = SplitUpdate(SGD(model.parameters(), lr=0.1), source, 0.0, 1.0)
    backward(model, 0)
    with pytest.raises(ThalwegError):
        split.step()
    assert torch.equal(flat(model), flat(network()))


@pytest.mark.parametrize("through", ["the wrapper", "the wrapped"])
def test_an_added_group_moves_whole_and_the_subspace_is_that_of_the_point_before(
    through: str,
) -> None:
    model = network().double()
    loss = Objective(model, nn.MSELoss(), (INPUTS.double(), TARGETS.double()), parameters="0.*")
    source = SubspaceTracker(loss, 2, exact=True)
    base = SGD(model[0].parameters(), lr=0.1)
    split = SplitUpdate(base, source, 0.0, 1.0)
    nn.functional.mse_loss(model(INPUTS.double()), TARGETS.double()).backward()
    size = loss.num_parameters
    dense = torch.autograd.functional.hessian(lambda theta: _value_at(model, theta), loss.theta())
    expected = torch.linalg.eigvalsh(dense)[size - 2 :].flip(0)
    group = {"params": list(model[2].parameters()), "lr": 50.0}
    (split if through == "the wrapper" else base).add_param_group(group)
    before = [p.detach().clone() for p in model[2].parameters()]
    split.step()
    assert torch.allclose(source.subspace.eigenvalues, expected, rtol=1e-5)
    for p, value in zip(model[2].parameters(), before, strict=True):
        assert p.grad is not None
        assert torch.equal(p.detach(), value - 50 * p.grad)


def _value_at(model: nn.Sequential, theta: Tensor) -> Tensor:
    weight, bias = theta[:12].reshape(4, 3), theta[12:]
    hidden = torch.tanh(nn.functional.linear(INPUTS.double(), weight, bias))
    return nn.functional.mse_loss(model[2](hidden), TARGETS.double())


def test_a_group_that_the_loss_knows_nothing_of_is_refused() -> None:
    model, other = network(), nn.Linear(3, 3)
    split = SplitUpdate(SGD(model.parameters(), lr=0.1), tracker(model), 0.0, 1.0)
    with pytest.raises(InvalidInput, match=r"shape \(3, 3\)', allowed: parameters of the model"):
        split.add_param_group({"params": list(other.parameters())})
    assert len(split.param_groups) == 1
    bare = SGD(model.parameters(), lr=0.1)
    source = FixedSubspace(random_subspace(26, 3, 0))
    split = SplitUpdate(bare, source, 0.0, 1.0)
    with pytest.raises(InvalidInput, match="add_param_group"):
        split.add_param_group({"params": other.weight})
    bare.add_param_group({"params": [other.weight]})
    before = flat(model)
    backward(model, 0)
    with pytest.raises(InvalidInput, match=r"\(3, 3\) that the subspace knows nothing of"):
        split.step()
    assert torch.equal(flat(model), before)
