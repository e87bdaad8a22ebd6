"""The naive reference: a loss written out for one flat vector, and its Hessian in full.

Double backward over a flat vector and central differences share no code with `Objective`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.networks import Case

Loss = Callable[[Tensor], Tensor]
Outputs = Callable[[Tensor], Tensor]


def parameter_names(case: Case) -> list[str]:
    return [name for name, p in case.model.named_parameters() if p.requires_grad]


def flat_parameters(case: Case, names: Sequence[str] | None = None) -> Tensor:
    named = dict(case.model.named_parameters())
    names = parameter_names(case) if names is None else names
    return torch.cat([named[name].detach().reshape(-1) for name in names])


def flat_loss(case: Case, names: Sequence[str] | None = None, rows: object = slice(None)) -> Loss:
    """The mean loss over some rows of the data, as a function of one flat vector."""
    outputs, target = flat_outputs(case, names, rows), case.data[1][rows]  # type: ignore[index]
    return lambda theta: case.loss(outputs(theta), target)


def flat_outputs(
    case: Case, names: Sequence[str] | None = None, rows: object = slice(None)
) -> Outputs:
    """The model's outputs on some rows of the data, as a function of one flat vector."""
    named = dict(case.model.named_parameters())
    names = parameter_names(case) if names is None else names
    inputs = case.data[0][rows]  # type: ignore[index]

    def outputs(theta: Tensor) -> Tensor:
        state, begin = {}, 0
        for name in names:
            size = named[name].numel()
            state[name] = theta[begin : begin + size].reshape(named[name].shape)
            begin += size
        with sdpa_kernel(SDPBackend.MATH):
            return functional_call(case.model, state, (inputs,))

    return outputs


def hessian(loss: Loss, theta: Tensor) -> Tensor:
    """By double backward; `torch.func.hessian` is wrong on LayerNorm."""
    return torch.autograd.functional.hessian(loss, theta)


def gauss_newton(case: Case, theta: Tensor) -> Tensor:
    """J^T H_L J from the whole Jacobian of the outputs, one backward pass for each of them."""
    outputs = flat_outputs(case)
    z = outputs(theta)
    jacobian = torch.autograd.functional.jacobian(outputs, theta).reshape(z.numel(), -1)

    def loss(flat: Tensor) -> Tensor:
        return case.loss(flat.reshape(z.shape), case.data[1])

    return jacobian.T @ torch.autograd.functional.hessian(loss, z.reshape(-1)) @ jacobian


def gradient(loss: Loss, theta: Tensor) -> Tensor:
    theta = theta.clone().requires_grad_()
    return torch.autograd.grad(loss(theta), theta)[0]


def differences(loss: Loss, theta: Tensor, vector: Tensor, step: float = 1e-6) -> Tensor:
    """H v by a fourth-order central difference of the gradient, too short to cross a kink."""

    def central(h: float) -> Tensor:
        ahead, behind = gradient(loss, theta + h * vector), gradient(loss, theta - h * vector)
        return (ahead - behind) / (2 * h)

    return (4 * central(step) - central(2 * step)) / 3


def relative(value: Tensor, reference: Tensor) -> float:
    return float((value.double() - reference.double()).norm() / reference.double().norm())
