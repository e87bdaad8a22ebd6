from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from thalweg.errors import Diverged, InvalidInput
from thalweg.loss.function_loss import FunctionLoss
from thalweg.measure.watch import watch_loss
from thalweg.operators.hessian import Hessian
from thalweg.optim.split import SplitUpdate
from thalweg.spectrum.eigensolver import eigenpairs
from thalweg.tracking.tracker import SubspaceTracker


def quartic(theta: Tensor) -> Tensor:
    return (theta**4).sum() + theta[0] * theta[1]


def test_value_gradient_and_hessian_are_those_by_hand() -> None:
    theta = torch.tensor([1.0, 2.0], dtype=torch.float64)
    loss = FunctionLoss(quartic, theta)
    value, gradient = loss.value_and_gradient()
    assert (value.item(), gradient.tolist()) == (19.0, [6.0, 33.0])
    assert loss.value().item() == 19.0
    assert not loss.value().requires_grad
    matrix = torch.tensor([[12.0, 1.0], [1.0, 48.0]], dtype=torch.float64)
    assert torch.equal(Hessian(loss) @ torch.eye(2, dtype=torch.float64), matrix)
    at_zero = Hessian(loss, torch.zeros(2, dtype=torch.float64)) @ torch.eye(2).double()
    assert at_zero.tolist() == [[0.0, 1.0], [1.0, 0.0]]
    found = eigenpairs(loss, 2, tolerance=1e-10).eigenvalues
    assert torch.allclose(found, torch.linalg.eigvalsh(matrix).flip(0))


def test_an_optimizer_of_the_tensor_moves_the_loss() -> None:
    theta = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    loss = FunctionLoss(quartic, theta)
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.01)
    quartic(theta).backward()
    optimizer.step()
    assert torch.allclose(loss.theta(), torch.tensor([1 - 0.06, 2 - 0.33]))
    loss.write(torch.tensor([3.0, 0.0]))
    assert theta.tolist() == [3.0, 0.0]
    assert loss.value().item() == 81.0


def test_samples_reach_a_function_of_several() -> None:
    targets = torch.tensor([0.0, 2.0, 4.0])

    def mean(theta: Tensor, samples: Tensor | None) -> Tensor:
        chosen = targets if samples is None else targets[samples]
        return (theta - chosen).square().mean()

    loss = FunctionLoss(mean, torch.ones(1), num_samples=3)
    assert loss.value().item() == pytest.approx(11 / 3)
    assert loss.value_and_gradient(samples=torch.tensor([2]))[1].item() == -6.0
    with pytest.raises(InvalidInput, match="samples: got 3"):
        loss.value(samples=torch.tensor([3]))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FunctionLoss(quartic, torch.ones(2, 2)), r"theta: got 'torch.float32 \(2, 2\)"),
        (
            lambda: FunctionLoss(quartic, torch.ones(2, dtype=torch.int64)),
            "theta: got 'torch.int64",
        ),
        (lambda: FunctionLoss(quartic, torch.ones(0)), "theta: got"),
        (lambda: FunctionLoss(quartic, torch.ones(2), 0), "num_samples: got 0"),
        (lambda: FunctionLoss(lambda t: t, torch.ones(2)).value(), r"loss: got \(2,\)"),
        (lambda: FunctionLoss(lambda t: 3.0, torch.ones(2)).value(), "loss: got 'float'"),
        (lambda: FunctionLoss(lambda t: torch.ones(()), torch.ones(2)).value(), "not depend"),
        (lambda: FunctionLoss(quartic, torch.ones(2)).value(torch.ones(3)), r"theta: got \(3,\)"),
    ],
)
def test_what_is_no_loss_is_refused(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        build()


def test_a_value_that_is_not_finite_is_divergence() -> None:
    loss = FunctionLoss(lambda t: t.log().sum(), torch.zeros(2))
    for ask in (loss.value, loss.value_and_gradient, loss.linearize):
        with pytest.raises(Diverged, match="the loss is NaN or infinite"):
            ask()


def test_it_says_what_it_is() -> None:
    assert repr(FunctionLoss(quartic, torch.ones(2))) == "FunctionLoss(P=2, N=1)"


def test_an_optimizer_with_a_closure_a_split_and_a_watcher_follow_it() -> None:
    """Of L = (100 x^2 + 4 y^2 + z^2) / 2 the dominant direction is x, and SGD contracts each."""
    theta = torch.tensor([0.3, 1.0, -2.0], dtype=torch.float64, requires_grad=True)
    curvatures = torch.tensor([100.0, 4.0, 1.0], dtype=torch.float64)
    loss = FunctionLoss(lambda t: (curvatures * t**2).sum() / 2, theta)
    tracker = SubspaceTracker(loss, k=1)
    optimizer = SplitUpdate(torch.optim.SGD([theta], lr=0.1), tracker, dominant=0.0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = (curvatures * theta**2).sum() / 2
        value.backward()
        return value

    with watch_loss(loss, optimizer, k=2, every=1, quiet=True) as watcher:
        for _ in range(4):
            optimizer.step(closure)
    expected = torch.tensor([0.3, 0.6**4, -2.0 * 0.9**4], dtype=torch.float64)
    assert torch.allclose(theta.detach(), expected, atol=1e-6)
    assert len(watcher.history) == 4
    assert not any(row["failure"] for row in watcher.history)
    for row in watcher.history:
        assert row["sharpness"] == pytest.approx(100.0, rel=1e-4)


def test_a_watcher_of_parameters_that_nobody_trains_is_refused() -> None:
    loss = FunctionLoss(lambda t: (t**2).sum(), torch.ones(2))
    other = torch.optim.SGD([torch.ones(2, requires_grad=True)], lr=0.1)
    with pytest.raises(InvalidInput, match="none of the parameters"):
        watch_loss(loss, other, k=1)
