"""A model in bfloat16, float16 or several dtypes has the derivatives of its float64 copy."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests import dense
from tests.sampling import few
from thalweg.errors import InvalidInput
from thalweg.loss.objective import Objective
from thalweg.measure.watch import watch
from thalweg.operators.gauss_newton import GaussNewton
from thalweg.operators.hessian import Hessian
from thalweg.spectrum.eigensolver import top_eigenpairs

LOSS = nn.CrossEntropyLoss()
torch.manual_seed(0)
INPUTS, TARGETS = torch.randn(24, 4).bfloat16().float(), torch.randint(0, 3, (24,))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3))


class Mixed(nn.Module):
    """A first part in another dtype than the last, with the casts that it needs."""

    def __init__(self, dtype: torch.dtype, *, checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 5).to(dtype), nn.Linear(5, 3)
        self.register_buffer("shift", torch.full((5,), 0.1, dtype=dtype))
        self.constant = torch.full((5,), 0.2, dtype=dtype)
        self.dtype, self.checkpointed = dtype, checkpointed

    def forward(self, inputs: Tensor) -> Tensor:
        states = self.first(inputs.to(self.dtype)) + self.shift
        if not self.checkpointed:
            return self.end(states)
        return checkpoint(self.end, states, use_reentrant=False)  # type: ignore[return-value]

    def end(self, states: Tensor) -> Tensor:
        scaled = states.type(self.dtype) @ torch.diag(self.constant).to(dtype=self.dtype)
        return self.last((torch.tanh(scaled) + torch.zeros(5, dtype=self.dtype)).float())


def in_float64(model: nn.Module) -> nn.Module:
    wide = copy.deepcopy(model).double()
    for module in wide.modules():
        if isinstance(module, Mixed):
            module.constant, module.dtype = module.constant.double(), torch.float64
            module.checkpointed = False
            module.end = (  # type: ignore[method-assign]
                lambda states, m=module: m.last(torch.tanh(states @ torch.diag(m.constant)))
            )
    return wide


MODELS = {
    "bfloat16": lambda: net().bfloat16(),
    "float16": lambda: net().half(),
    "bfloat16 and float32": lambda: Mixed(torch.bfloat16),
    "bfloat16 in a checkpoint": lambda: Mixed(torch.bfloat16, checkpointed=True),
    "float64 and float32": lambda: Mixed(torch.float64),
}


@pytest.mark.parametrize("name", few(2, list(MODELS)))
def test_derivatives_are_those_of_the_float64_copy(name: str) -> None:
    model = MODELS[name]()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    inputs = INPUTS if isinstance(model, Mixed) else INPUTS.to(model[0].weight.dtype)
    if name == "float64 and float32":
        inputs = inputs.double()
    objective = Objective(model, LOSS, (inputs, TARGETS))
    exact = Objective(in_float64(model), LOSS, (INPUTS.double(), TARGETS))
    dtype = torch.float64 if name == "float64 and float32" else torch.float32
    theta = objective.theta()
    vectors = torch.randn(objective.num_parameters, 3, dtype=dtype)
    assert objective.dtype == theta.dtype == objective.value().dtype == dtype
    assert torch.equal(objective.value(), objective.value(theta))
    moved = theta + 0.1
    found = (objective.gradient(moved), Hessian(objective, moved) @ vectors)
    found += (GaussNewton(objective, moved) @ vectors,)
    wide, block = moved.double(), vectors.double()
    truth = (exact.gradient(wide), Hessian(exact, wide) @ block, GaussNewton(exact, wide) @ block)
    for one, other in zip(found, truth, strict=True):
        assert one.dtype == dtype
        assert dense.relative(one.double(), other) < 1e-5
    subspace = top_eigenpairs(Hessian(objective), 2, tolerance=1e-4)
    expected = top_eigenpairs(Hessian(exact), 2, tolerance=1e-8)
    assert torch.allclose(subspace.eigenvalues.double(), expected.eigenvalues, rtol=1e-3)
    for n, tensor in model.state_dict().items():
        assert tensor.dtype == before[n].dtype
        assert torch.equal(tensor, before[n])


def test_theta_is_written_and_read_without_a_loss() -> None:
    model = net().bfloat16()
    objective = Objective(model, LOSS, (INPUTS.bfloat16(), TARGETS))
    theta = objective.theta()
    objective.write(theta)
    assert torch.equal(objective.theta(), theta)
    assert model[0].weight.dtype == torch.bfloat16


def test_a_frozen_base_in_bfloat16_is_evaluated_in_float32_too() -> None:
    model = Mixed(torch.bfloat16)
    model.first.requires_grad_(False)
    objective = Objective(model, LOSS, (INPUTS, TARGETS))
    exact = Objective(in_float64(model), LOSS, (INPUTS.double(), TARGETS))
    assert dense.relative(objective.gradient().double(), exact.gradient()) < 1e-5
    assert model.first.weight.dtype == torch.bfloat16


def test_a_training_in_bfloat16_is_watched() -> None:
    model = net().bfloat16()
    exact = Objective(in_float64(model), LOSS, (INPUTS.double(), TARGETS))
    expected = float(top_eigenpairs(Hessian(exact), 1).eigenvalues[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = (INPUTS.bfloat16(), TARGETS)
    with watch(model, LOSS, data, optimizer, k=2, every=1, quiet=True) as watcher:
        LOSS(model(data[0]), TARGETS).backward()
        optimizer.step()
    assert watcher.history[0]["sharpness"] == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn])
def test_parameters_in_other_dtypes_are_refused_by_name(dtype: torch.dtype) -> None:
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(3).to(dtype))
    with pytest.raises(InvalidInput, match=f"'weight'.*{dtype!s}.*float32"):
        Objective(model, None, (INPUTS,))


def test_parameters_without_a_shape_are_refused_by_name() -> None:
    with pytest.raises(InvalidInput, match=r"'0\.weight'.*evaluate the model once"):
        Objective(nn.Sequential(nn.LazyLinear(3)), LOSS, (INPUTS, TARGETS))


class Complex(nn.Module):
    """Sees a real parameter as complex numbers; it stands behind one of odd length."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shift, self.filter = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.randn(3, 2))

    def forward(self, inputs: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(inputs) * torch.view_as_complex(self.filter)
        return torch.fft.irfft(spectrum, n=4) + self.shift


@pytest.mark.parametrize("vectorize_up_to", [None, 0, 10**6])
def test_a_parameter_seen_as_complex_numbers_may_stand_anywhere_in_theta(
    vectorize_up_to: int | None,
) -> None:
    model, targets = Complex(), torch.randn(24, 4)
    objective = Objective(
        model, nn.MSELoss(), (INPUTS, targets), vectorize_up_to=vectorize_up_to, chunk_size=9
    )
    parameters = list(model.parameters())
    loss = nn.MSELoss()(model(INPUTS), targets)
    gradient = torch.autograd.grad(loss, parameters, create_graph=True)
    ones = [torch.ones_like(p) for p in parameters]
    product = objective.layout.flatten(torch.autograd.grad(gradient, parameters, ones))
    theta = objective.theta()
    assert torch.allclose(objective.value(theta), loss.detach(), rtol=1e-6)
    assert torch.allclose(objective.gradient(theta), objective.layout.flatten(gradient), atol=1e-6)
    for operator in (Hessian(objective), Hessian(objective, theta, keep_graph=True)):
        assert torch.allclose(operator @ torch.ones(7), product, atol=1e-5)
        assert torch.allclose((operator @ torch.ones(7, 4))[:, 2], product, atol=1e-5)
