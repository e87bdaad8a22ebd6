from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from tests import dense
from tests.networks import silu
from thalweg.errors import InvalidInput
from thalweg.loss.objective import Objective
from thalweg.measure.preconditioned_sharpness import preconditioned_sharpness
from thalweg.tracking.preconditioner import has_preconditioner, metric_of, preconditioner


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Adam, {"eps": 1e-3}),
        (Adam, {"betas": (0.8, 0.9), "amsgrad": True}),
        (AdamW, {"weight_decay": 0.0, "foreach": True}),
        (RMSprop, {"eps": 1e-3}),
        (RMSprop, {"centered": True, "alpha": 0.5}),
    ],
)
def test_the_update_of_torch_is_the_moving_average_divided_by_the_preconditioner(
    kind: type[Optimizer], options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    parts = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in ((3, 2), (4,))]
    optimizer = kind(
        [{"params": parts[:1]}, {"params": parts[1:], "eps": 1e-2}],  # type: ignore[call-arg]
        **{"lr": 0.1} | options,
    )
    # Not the optimizer's order.
    order = parts[::-1]
    for _ in range(4):
        for part in parts:
            part.grad = torch.randn_like(part)
        before = torch.cat([part.detach().reshape(-1) for part in order])
        optimizer.step()
        update = torch.cat([part.detach().reshape(-1) for part in order]) - before
        average = torch.cat([optimizer.state[p].get("exp_avg", p.grad).reshape(-1) for p in order])
        diagonal = preconditioner(optimizer, order)
        torch.testing.assert_close(update, -0.1 * average / diagonal, rtol=1e-9, atol=1e-12)
    assert torch.equal(preconditioner(optimizer), torch.cat([diagonal[4:], diagonal[:4]]))


def test_a_preconditioner_that_does_not_exist_is_refused() -> None:
    one, two = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(2))
    with pytest.raises(InvalidInput, match="got 'SGD', allowed: Adam, AdamW or RMSprop"):
        preconditioner(SGD([one], lr=0.1))
    adam = Adam([one, two])
    with pytest.raises(InvalidInput, match=r"parameter 0, \(1,\): .*no second moment of it yet"):
        preconditioner(adam)
    one.grad = torch.ones(1)
    adam.step()
    assert preconditioner(adam, [one]).shape == (1,)
    with pytest.raises(InvalidInput, match=r"parameter 1, \(2,\): .*in which it has a gradient"):
        preconditioner(adam)
    with pytest.raises(InvalidInput, match="one that the optimizer updates"):
        preconditioner(adam, [nn.Parameter(torch.zeros(3))])


@pytest.mark.parametrize(
    ("kind", "options"),
    [(Adam, {}), (Adam, {"weight_decay": 0.3}), (AdamW, {"weight_decay": 0.3}), (RMSprop, {})],
)
def test_the_preconditioned_sharpness_is_that_of_the_dense_matrix(
    kind: type[Optimizer], options: dict[str, Any]
) -> None:
    case = silu().to(torch.float64)
    objective = Objective(case.model, case.loss, case.data)
    optimizer = kind(case.model.parameters(), **{"lr": 0.01} | options)  # type: ignore[call-arg]
    for _ in range(3):
        optimizer.zero_grad()
        case.loss(case.model(case.data[0]), case.data[1]).backward()
        theta = objective.theta()
        optimizer.step()
    hessian = dense.hessian(dense.flat_loss(case), theta)
    if kind is Adam:
        hessian += options.get("weight_decay", 0.0) * torch.eye(len(theta))
    diagonal = preconditioner(optimizer)
    # Similar to D^-1/2 H D^-1/2, and not symmetric.
    expected = float(torch.linalg.eigvals(hessian / diagonal[:, None]).real.max())
    found = preconditioned_sharpness(objective, optimizer, theta, tolerance=1e-6)
    assert float(found.eigenvalues[0]) == pytest.approx(expected, rel=1e-6)
    again = preconditioned_sharpness(objective, optimizer, theta, start=found.basis[:, 0])
    assert again.num_matvecs < found.num_matvecs


def test_a_preconditioner_with_a_zero_is_refused() -> None:
    model, data = nn.Linear(2, 1), (torch.tensor([[1.0, 0.0]]), torch.ones(1, 1))
    optimizer = Adam(model.parameters(), eps=0.0)
    nn.MSELoss()(model(data[0]), data[1]).backward()
    optimizer.step()
    with pytest.raises(InvalidInput, match=r"preconditioner: got 0\.0, .*raise eps"):
        preconditioned_sharpness(Objective(model, nn.MSELoss(), data), optimizer)


@pytest.mark.parametrize(("kind", "shift"), [(Adam, 0.3), (AdamW, 0.0), (RMSprop, 0.3)])
def test_the_metric_is_the_preconditioner_and_the_decay_added_to_the_gradient(
    kind: type[Optimizer], shift: float
) -> None:
    case = silu()
    optimizer = kind(case.model.parameters(), weight_decay=0.3)  # type: ignore[call-arg]
    assert has_preconditioner(optimizer)
    case.loss(case.model(case.data[0]), case.data[1]).backward()
    optimizer.step()
    diagonal, decay = metric_of(optimizer, Objective(case.model, case.loss, case.data))
    assert torch.equal(diagonal, preconditioner(optimizer))
    assert decay == shift
    assert not has_preconditioner(SGD(case.model.parameters(), lr=0.1))
