from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from tests.networks import Case, mlp
from tests.sampling import few
from thalweg import watch
from thalweg.errors import Diverged, InvalidInput
from thalweg.loss.function_loss import FunctionLoss
from thalweg.loss.objective import Objective
from thalweg.measure.critical_sharpness import critical_sharpness, critical_sharpness_along
from thalweg.optim.sam import SAM
from thalweg.optim.split import SplitUpdate
from thalweg.optim.virtual_step import proposed_update
from thalweg.tracking.tracker import SubspaceTracker

OPTIMIZERS: dict[str, Callable[[list[Tensor]], Optimizer]] = {
    "gradient descent": lambda p: SGD(p, lr=0.003),
    "momentum": lambda p: SGD(p, lr=0.003, momentum=0.9),
    "weight decay": lambda p: SGD(p, lr=0.003, weight_decay=0.1),
    "adam": lambda p: Adam(p, lr=0.003),
    "adamw": lambda p: AdamW(p, lr=0.003, weight_decay=0.1),
    "rmsprop": lambda p: RMSprop(p, lr=0.003),
}


def quadratic(seed: int) -> tuple[FunctionLoss, nn.Parameter, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    hessian = root @ root.T
    theta = nn.Parameter(torch.randn(6, generator=generator, dtype=torch.float64))
    return FunctionLoss(lambda t: t @ hessian @ t / 2, theta), theta, hessian


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("seed", range(3))
def test_on_a_quadratic_it_is_the_closed_form(name: str, seed: int) -> None:
    loss, theta, hessian = quadratic(seed)
    optimizer = OPTIMIZERS[name]([theta])
    for _ in range(3):
        theta.grad = (hessian @ theta).detach()
        optimizer.step()
    theta.grad = (hessian @ theta).detach()
    update = proposed_update(optimizer, loss)
    expected = -float(update @ hessian @ update) / (0.003 * float(update @ theta.grad))
    found = critical_sharpness(loss, optimizer)
    assert abs(found.value - expected) <= found.error <= 0.06 * expected
    assert found.value == pytest.approx(expected, rel=1e-6)
    assert found.learning_rate == pytest.approx(2 / found.value)
    slope = float(update @ theta.grad)
    known = critical_sharpness_along(loss, update, 0.003, slope=slope, loss=float(loss.value()))
    assert known.value == pytest.approx(expected, rel=1e-6)
    assert known.evaluations <= min(6, found.evaluations - 1)


def first_rise(loss: Callable[[Tensor], float], theta: Tensor, update: Tensor) -> float:
    """The factor of the update at which a fine scan sees the loss rise."""
    begin = loss(theta)
    factors = torch.logspace(-3, 4, 1401, base=10.0, dtype=torch.float64)
    return next(float(f) for f in factors if loss(theta + f * update) > begin)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("seed", few(2, range(40)))
def test_on_a_network_the_first_rise_of_a_scan_is_within_the_error(
    dtype: torch.dtype, seed: int
) -> None:
    case = mlp().to(dtype)
    generator = torch.Generator().manual_seed(seed)
    for parameter in case.model.parameters():
        nn.init.normal_(parameter, std=0.7, generator=generator)
    rate = 10 ** (-3 * float(torch.rand(1, generator=generator)))
    loss = Objective(case.model, case.loss, case.data)
    wide = mlp().to(torch.float64)
    wide.model.load_state_dict(case.model.state_dict())
    exact = Objective(wide.model, wide.loss, wide.data)
    update = -rate * loss.gradient()
    found = critical_sharpness_along(loss, update, rate)
    truth = first_rise(lambda t: float(exact.value(t)), exact.theta(), update.double())
    # The scan itself is as fine as 1.2 %.
    assert abs(found.value - 2 / (truth * rate)) <= found.error + 0.012 * found.value


def test_an_update_that_is_no_descent_direction_has_none_and_says_why() -> None:
    loss, theta, hessian = quadratic(0)
    uphill = 0.01 * (hessian @ theta).detach()
    slope = float(uphill @ hessian @ theta.detach())
    for known in (None, slope):
        found = critical_sharpness_along(loss, uphill, 0.01, slope=known)
        assert math.isnan(found.value)
        assert "no descent direction" in found.reason
    found = critical_sharpness_along(loss, torch.zeros_like(uphill), 0.01)
    assert math.isnan(found.value)
    assert "zero" in found.reason


def test_where_the_loss_falls_for_ever_it_is_0_and_says_so() -> None:
    loss = FunctionLoss(lambda t: -t.sum(), torch.ones(3, dtype=torch.float64))
    found = critical_sharpness_along(loss, torch.full((3,), 0.1).double(), 0.1)
    assert (found.value, found.learning_rate) == (0.0, math.inf)
    assert "does not rise" in found.reason


def test_a_loss_that_ends_in_nan_or_infinity_rises_there() -> None:
    # -log(t - 1) + t falls up to t = 2, is as large again at 3.51..., and no number from 1 down.
    loss = FunctionLoss(lambda t: (t - torch.log(t - 1)).sum(), torch.tensor([2.5]).double())
    found = critical_sharpness_along(loss, torch.tensor([-0.01]).double(), 0.01)
    begin = 2.5 - math.log(1.5)
    grid = torch.linspace(2.0, 1.0001, 100_001, dtype=torch.float64)
    rise = next(float(t) for t in grid if float(t) - math.log(float(t) - 1) > begin)
    assert abs(found.value - 2 / (2.5 - rise)) <= found.error
    nan = FunctionLoss(lambda t: t.sum() * math.nan, torch.ones(2).double())
    with pytest.raises(Diverged):
        critical_sharpness_along(nan, torch.ones(2).double(), 0.1)


def test_below_the_rounding_of_the_loss_the_error_says_that_nothing_is_seen() -> None:
    # 1e6 + t^2 / 2 in float32: the units of its last place are 0.06.
    for size, seen in ((100.0, True), (0.1, False)):
        loss = FunctionLoss(lambda t: 1e6 + (t * t).sum() / 2, torch.tensor([size]))
        found = critical_sharpness_along(loss, torch.tensor([-0.1 * size]), 0.1)
        assert seen is (found.error < 0.1 * found.value)
        assert math.isnan(found.value) or abs(found.value - 1.0) <= found.error


def test_nothing_is_changed(two_layers: tuple[Case, Optimizer]) -> None:
    case, optimizer = two_layers
    before = copy.deepcopy((case.model.state_dict(), optimizer.state_dict()))
    gradients = [p.grad.clone() for p in case.model.parameters() if p.grad is not None]
    state = torch.get_rng_state()
    steps: list[object] = []
    optimizer.register_step_post_hook(lambda *_: steps.append(None))
    assert math.isfinite(
        critical_sharpness(Objective(case.model, case.loss, case.data), optimizer).value
    )
    torch.testing.assert_close(
        (case.model.state_dict(), optimizer.state_dict()), before, rtol=0, atol=0
    )
    held = [p.grad for p in case.model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(held, gradients, strict=True) if a is not None)
    assert torch.equal(torch.get_rng_state(), state)
    assert steps == []


@pytest.fixture
def two_layers() -> tuple[Case, Optimizer]:
    case = mlp().to(torch.float64)
    optimizer = Adam(case.model.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        case.loss(case.model(case.data[0]), case.data[1]).backward()
        optimizer.step()
    return case, optimizer


def test_the_update_is_the_one_that_the_optimizer_makes(
    two_layers: tuple[Case, Optimizer],
) -> None:
    case, optimizer = two_layers
    objective = Objective(case.model, case.loss, case.data)
    proposed = proposed_update(optimizer, objective)
    before = objective.theta()
    optimizer.step()
    torch.testing.assert_close(proposed, objective.theta() - before, rtol=1e-12, atol=1e-15)


def test_without_gradients_it_is_by_the_objectives_own(two_layers: tuple[Case, Optimizer]) -> None:
    case, _ = two_layers
    objective = Objective(case.model, case.loss, case.data)
    sgd = SGD(case.model.parameters(), lr=0.1)
    sgd.zero_grad()
    torch.testing.assert_close(proposed_update(sgd, objective), -0.1 * objective.gradient())


def test_wrapped_optimizers_are_looked_into_and_unfit_ones_refused() -> None:
    loss, theta, _ = quadratic(1)
    base = SGD([theta], lr=0.01)
    split = SplitUpdate(base, SubspaceTracker(loss, 2), dominant=0.0)
    torch.testing.assert_close(proposed_update(split, loss), proposed_update(base, loss))
    for unfit in (SAM(base, rho=0.1), torch.optim.LBFGS([theta])):
        with pytest.raises(InvalidInput, match=r"no closure.*critical_sharpness_along"):
            critical_sharpness(loss, unfit)
    with pytest.raises(InvalidInput, match="none of the parameters"):
        critical_sharpness(loss, SGD([nn.Parameter(torch.ones(2))], lr=0.1))
    with pytest.raises(InvalidInput, match="lr of the optimizer"):
        critical_sharpness(loss, SGD([theta], lr=0.0))
    for keywords in ({"tolerance": 1.0}, {"learning_rate": 0.0}):
        with pytest.raises(InvalidInput, match=next(iter(keywords))):
            critical_sharpness_along(loss, theta.detach(), **({"learning_rate": 0.1} | keywords))


def test_watch_reports_it_on_request() -> None:
    case = mlp()
    optimizer = SGD(case.model.parameters(), lr=0.05)
    probes = ("critical_sharpness", "directional_sharpness", "gradient_noise_scale")
    with watch(
        case.model, case.loss, case.data, optimizer, every=1, k=2, quiet=True, probes=probes
    ) as watcher:
        optimizer.zero_grad()
        case.loss(case.model(case.data[0]), case.data[1]).backward()
        optimizer.step()
    row = watcher.history[0]
    # Gradient descent over all samples: both are the curvature along the gradient, the first up to
    # third derivatives.
    assert row["critical_sharpness"] == pytest.approx(row["directional_sharpness_update"], rel=0.3)
    assert 0 < row["critical_sharpness_passes"] <= 10
    assert row["gradient_noise_scale"] > 0
