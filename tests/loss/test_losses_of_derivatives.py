"""Losses with derivatives by the inputs inside: in the model, in the loss, by any tool of torch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.utils.data import TensorDataset

from tests import dense
from tests.sampling import few
from thalweg.errors import InvalidInput
from thalweg.loss.objective import Objective
from thalweg.measure.watch import watch
from thalweg.operators.gauss_newton import GaussNewton
from thalweg.operators.gradient_covariance import GradientCovariance
from thalweg.operators.hessian import Hessian

N = 9


class _Network(nn.Module):
    def __init__(self, outputs: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, outputs)).double()


class _Helmholtz(_Network):
    """The residual of an equation, by `torch.autograd.grad` in the model."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_()
        slope = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)[0]
        parts = [
            torch.autograd.grad(slope[:, i].sum(), x, create_graph=True)[0][:, i : i + 1]
            for i in range(2)
        ]
        return parts[0] + parts[1] + self.net(x)


class _HelmholtzByTransforms(_Network):
    def forward(self, x: Tensor) -> Tensor:
        curvature = vmap(jacrev(grad(lambda point: self.net(point)[0])))(x)
        return curvature.diagonal(dim1=1, dim2=2).sum(1, keepdim=True) + self.net(x)


class _WithInputs(_Network):
    """Gives the inputs back, for the loss to differentiate by."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        return x, self.net(x)


class _WithScaledInputs(_Network):
    """The inputs that are given back are computed from those that came in."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = 2 * x.requires_grad_()
        return x, self.net(x)


class _Score(_Network):
    """Score matching: a vector field, and the trace of its Jacobian."""

    def __init__(self) -> None:
        super().__init__(2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        jacobian = vmap(jacrev(self.net))(x)
        return self.net(x), jacobian.diagonal(dim1=1, dim2=2).sum(1)


def _residual(output: Tensor, target: Tensor) -> Tensor:
    return ((output - target) ** 2).mean()


def _slopes(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    x, u = output
    slope = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
    return ((u - target) ** 2).mean() + ((slope.norm(dim=1) - 1) ** 2).mean()


def _score_matching(output: tuple[Tensor, Tensor], _: Tensor) -> Tensor:
    score, trace = output
    return (trace + (score**2).sum(1) / 2).mean()


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Tensor], Tensor]]] = {
    "equation in the model": (_Helmholtz, _residual),
    "equation by torch.func": (_HelmholtzByTransforms, _residual),
    "gradient penalty in the loss": (_WithInputs, _slopes),
    "by inputs that were computed": (_WithScaledInputs, _slopes),
    "score matching": (_Score, _score_matching),
}


def _data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(N, 2, generator=generator, dtype=torch.float64)
    return x, torch.randn(N, 1, generator=generator, dtype=torch.float64)


def _outputs(model: nn.Module, x: Tensor) -> Callable[[Tensor], Any]:
    def outputs(theta: Tensor) -> Any:
        state, begin = {}, 0
        for name, parameter in model.named_parameters():
            end = begin + parameter.numel()
            state[name], begin = theta[begin:end].reshape(parameter.shape), end
        return functional_call(model, state, (x.detach().clone(),))

    return outputs


def _dense(name: str, rows: Any = slice(None)) -> tuple[dense.Loss, Tensor]:
    build, loss = CASES[name]
    model, (x, target) = build(), _data()
    theta = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    outputs = _outputs(model, x[rows])
    return lambda at: loss(outputs(at), target[rows]), theta


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("chunk_size", few(1, [4, None]))
@pytest.mark.parametrize("given", few(1, ["tensors", "tensors that require a gradient", "dataset"]))
def test_value_gradient_and_hessian(name: str, chunk_size: int | None, given: str) -> None:
    build, loss = CASES[name]
    reference, theta = _dense(name)
    x, target = _data()
    data: Any = (x.requires_grad_("require" in given), target)
    if given == "dataset":
        data = TensorDataset(*data)
    objective = Objective(build(), loss, data, chunk_size=chunk_size)
    expected = reference(theta).item()
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with context():
            assert float(objective.value()) == pytest.approx(expected, rel=1e-12)
    product = Hessian(objective) @ torch.eye(len(theta)).double()
    assert dense.relative(objective.gradient(), dense.gradient(reference, theta)) < 1e-12
    assert dense.relative(product, dense.hessian(reference, theta)) < 1e-11
    assert x.grad is None
    assert x.requires_grad == ("require" in given)


@pytest.mark.parametrize("name", few(2, CASES))
def test_covariance_of_gradients(name: str) -> None:
    build, loss = CASES[name]
    objective = Objective(build(), loss, _data())
    theta, eye = objective.theta(), torch.eye(objective.num_parameters).double()
    rows = torch.stack([dense.gradient(_dense(name, [i])[0], theta) for i in range(N)])
    expected = (rows - rows.mean(0)).T @ (rows - rows.mean(0)) / N
    assert dense.relative(GradientCovariance(objective) @ eye, expected) < 1e-11


def test_gauss_newton_where_the_model_returns_what_the_loss_reads() -> None:
    for build in (_Helmholtz, _HelmholtzByTransforms):
        model, (x, target) = build(), _data()
        objective = Objective(model, _residual, (x, target))
        theta = objective.theta()
        jacobian = torch.autograd.functional.jacobian(_outputs(model, x), theta).reshape(N, -1)
        expected = jacobian.T @ jacobian * 2 / N
        product = GaussNewton(objective) @ torch.eye(len(theta)).double()
        assert dense.relative(product, expected) < 1e-11


@pytest.mark.parametrize("name", ["gradient penalty in the loss", "by inputs that were computed"])
def test_gauss_newton_of_a_derivative_that_the_loss_takes_is_refused(name: str) -> None:
    build, loss = CASES[name]
    objective = Objective(build(), loss, _data())
    with pytest.raises(InvalidInput, match=r"GaussNewton: the loss .*derivative.*take the Hessian"):
        _ = GaussNewton(objective) @ objective.theta()


def test_inputs_that_are_given_back_are_no_output_of_gauss_newton() -> None:
    """Where a loss weighs residuals by coordinates, they are constants."""
    model, (x, target) = _WithInputs(), _data()

    def weighed(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        x, u = output
        return (x[:, :1].exp() * (u - target) ** 2).mean()

    objective = Objective(model, weighed, (x, target))
    theta = objective.theta()
    outputs = _outputs(model, x)
    jacobian = torch.autograd.functional.jacobian(lambda at: outputs(at)[1], theta).reshape(N, -1)
    expected = jacobian.T @ (2 * x[:, :1].exp() * jacobian) / N
    product = GaussNewton(objective) @ torch.eye(len(theta)).double()
    assert dense.relative(product, expected) < 1e-11


@pytest.mark.parametrize("name", ["equation in the model", "gradient penalty in the loss"])
def test_watch_reports_its_sharpness(name: str) -> None:
    build, loss = CASES[name]
    model, (x, target) = build(), _data()
    reference, theta = _dense(name)
    expected = float(torch.linalg.eigvalsh(dense.hessian(reference, theta))[-1])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    trained = copy.deepcopy(model)
    with (
        torch.no_grad(),
        watch(model, loss, (x, target), optimizer, k=1, exact=True, quiet=True) as watcher,
    ):
        with torch.enable_grad():
            loss(trained(x.clone()), target).backward()
        for parameter, other in zip(model.parameters(), trained.parameters(), strict=True):
            parameter.grad = other.grad
        optimizer.step()
    (row,) = watcher.history
    assert not row["failure"]
    assert row["sharpness"] == pytest.approx(expected, rel=1e-3)
