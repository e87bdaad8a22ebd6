"""A second derivative that is not that of the gradient is refused, and a right one is not."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrizations

from tests.sampling import few
from thalweg.errors import InvalidInput
from thalweg.loss.function_loss import FunctionLoss
from thalweg.loss.objective import Objective
from thalweg.loss.reduce import Reduction
from thalweg.operators import product_check
from thalweg.operators.gauss_newton import GaussNewton, ResidualHessian
from thalweg.operators.gradient_covariance import GradientCovariance
from thalweg.operators.hessian import Hessian
from thalweg.operators.product_check import compared
from thalweg.spectrum.eigensolver import eigenpairs
from thalweg.tracking.tracker import SubspaceTracker

CHECK_FALSE = "check=False"


def data(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(0, 3, (24,), generator=generator)
    return torch.randn(24, 4, generator=generator).to(dtype), targets


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * grad


class Forgetful(torch.autograd.Function):
    """A square whose backward pass holds its input as a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.x = x.detach()
        return x**2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.x * grad


class RightSquare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


class Layer(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def around(function: Callable[[Tensor], Tensor]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Sequential(Layer(function)), nn.Linear(5, 3))


def objective(model: nn.Module, **options: Any) -> Objective:
    dtype = next(model.parameters()).dtype
    return Objective(model, nn.CrossEntropyLoss(), data(dtype), **options)


def test_weight_norm_of_torch_is_refused_with_what_works_instead() -> None:
    torch.manual_seed(0)
    normed = parametrizations.weight_norm(nn.Linear(4, 5))
    model = nn.Sequential(normed, nn.Tanh(), nn.Linear(5, 3)).double()
    loss = objective(model, product="exact")
    with pytest.raises(InvalidInput, match=r"weight_norm of torch in layer '0\.param.*v \* \(g"):
        eigenpairs(loss, 2)
    with pytest.raises(InvalidInput, match=CHECK_FALSE):
        SubspaceTracker(loss, 2).update()

    class Normed(nn.Module):
        """What the message gives."""

        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            v = linear.weight.detach()
            self.v, self.g = nn.Parameter(v.clone()), nn.Parameter(v.norm(dim=1, keepdim=True))
            self.bias = nn.Parameter(linear.bias.detach().clone())

        def forward(self, x: Tensor) -> Tensor:
            weight = self.v * (self.g / self.v.norm(dim=1, keepdim=True))
            return F.linear(x, weight, self.bias)

    written = objective(nn.Sequential(Normed(normed), nn.Tanh(), nn.Linear(5, 3)).double())
    assert math.isfinite(float(eigenpairs(written, 2).eigenvalues[0]))


@pytest.mark.parametrize("build", [nn.utils.weight_norm, parametrizations.weight_norm])
def test_weight_norm_of_a_convolution_is_refused_however_it_is_applied(build: Any) -> None:
    torch.manual_seed(0)
    with pytest.warns(FutureWarning) if build is nn.utils.weight_norm else _nothing():
        layer = build(nn.Conv1d(1, 3, 2))
    model = nn.Sequential(nn.Unflatten(1, (1, 4)), layer, nn.ReLU(), nn.Flatten(), nn.Linear(9, 3))
    with pytest.raises(InvalidInput, match=r"weight_norm of torch in layer '1"):
        _ = Hessian(objective(model)) @ torch.ones(sum(p.numel() for p in model.parameters()))


class Tied(nn.Module):
    """An Embedding with padding, whose weight is that of the head too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner = nn.Embedding(5, 4, padding_idx=0), nn.Linear(4, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        indices = (inputs.abs() * 3).long() % 5
        return torch.tanh(self.inner(self.embed(indices).sum(1))) @ self.embed.weight.T


class _nothing:  # noqa: N801
    def __enter__(self) -> None: ...
    def __exit__(self, *error: object) -> None: ...


@pytest.mark.parametrize("function", [Cube, Forgetful])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_function_whose_backward_pass_cannot_be_differentiated_is_named(
    function: Any, dtype: torch.dtype
) -> None:
    loss = objective(around(function.apply).to(dtype), product="exact")
    vector = torch.ones(loss.num_parameters, dtype=dtype)
    with pytest.raises(InvalidInput, match=rf"{function.__name__} \(a torch.*layer '1\.0' \(Layer"):
        _ = Hessian(loss) @ vector
    # Again, and for a second operator.
    with pytest.raises(InvalidInput, match=CHECK_FALSE):
        _ = Hessian(loss) @ vector
    with pytest.raises(InvalidInput, match=CHECK_FALSE):
        _ = ResidualHessian(loss) @ vector
    taken = Hessian(objective(around(function.apply).to(dtype), check=False)) @ vector
    assert bool(torch.isfinite(taken).all())


def test_gauss_newton_and_covariance_need_a_derivative_of_the_outputs() -> None:
    loss = objective(around(Cube.apply))
    vector = torch.ones(loss.num_parameters)
    for operator in (GaussNewton(loss), GradientCovariance(loss)):
        with pytest.raises(InvalidInput, match=f"{type(operator).__name__}: a product is not"):
            _ = operator @ vector


def test_a_small_wrong_layer_is_not_hidden_by_a_large_one() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 300), nn.ReLU(), nn.Linear(300, 3), Scaled(), nn.Tanh())
    with pytest.raises(InvalidInput, match=r"parameter '3\.scale'.*Forgetful"):
        _ = Hessian(objective(model)) @ torch.ones(sum(p.numel() for p in model.parameters()))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((1,), 1e-3))

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + Forgetful.apply(self.scale))


def test_a_plain_function_and_a_loss_of_ones_own_are_compared_too() -> None:
    theta = torch.tensor([1.0, -2.0, 0.5])
    plain = FunctionLoss(lambda t: Forgetful.apply(t).square().sum(), theta, product="exact")
    with pytest.raises(InvalidInput, match="parameter number 0"):
        _ = Hessian(plain) @ torch.ones(3)

    class Wrong(FunctionLoss):
        """Its products are off by a factor."""

        def linearize(self, *args: Any, **kwargs: Any) -> Any:
            right = super().linearize(*args, **kwargs)

            class Half:
                gradient = staticmethod(right.gradient)

                def multiply(self, rows: Tensor) -> Tensor:
                    return right.multiply(rows) / 2

            return Half()

    class Bare:
        def __init__(self) -> None:
            self.inner = Wrong(lambda t: (t**4).sum(), theta.double())

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

    bare: Any = Bare()
    with pytest.raises(InvalidInput, match="off by 50"):
        _ = Hessian(bare) @ torch.ones(3).double()
    bare = Bare()
    bare.check = False
    assert torch.allclose(Hessian(bare) @ torch.ones(3).double(), 6 * theta.double() ** 2)


def _without_graph(x: Tensor) -> Tensor:
    with torch.no_grad():
        return 2 * x.exp()


def zero_biases() -> nn.Module:
    model = nn.Sequential(
        nn.Linear(4, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 3)
    )
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.zeros_(layer.bias)
    nn.init.zeros_(layer.weight)
    return model


RIGHT: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: around(torch.relu),
    "all zero": zero_biases,
    "squared relu": lambda: around(lambda x: torch.relu(x) ** 2),
    "gelu": lambda: around(F.gelu),
    "hardswish": lambda: around(F.hardswish),
    "wide": lambda: nn.Sequential(nn.Linear(4, 400), nn.ReLU(), nn.Linear(400, 3)),
    "deep": lambda: nn.Sequential(
        *(layer for _ in range(8) for layer in (nn.Linear(4, 4), nn.LeakyReLU())), nn.Linear(4, 3)
    ),
    "max pooling": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 4)),
        nn.Conv1d(1, 6, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool1d(2),
        nn.Flatten(),
        nn.Linear(12, 3),
    ),
    "attention": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 2)),
        nn.Linear(2, 8),
        nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
        nn.Flatten(),
        nn.Linear(16, 3),
    ),
    "batch norm": lambda: nn.Sequential(
        nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)
    ).eval(),
    "spectral norm": lambda: nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3)
    ),
    "weight norm over all": lambda: nn.Sequential(
        parametrizations.weight_norm(nn.Linear(4, 5), dim=None), nn.Tanh(), nn.Linear(5, 3)
    ),
    # What a forward pass takes out of the graph is a constant.
    "detached": lambda: around(lambda x: x * x.detach()),
    "data": lambda: around(lambda x: x * x.data.exp()),
    "without graph": lambda: around(lambda x: x * _without_graph(x)),
    "a number": lambda: around(lambda x: x * float(x.sum())),
    "straight through": lambda: around(lambda x: x + (x.round() - x).detach()),
    "an embedding with padding": Tied,
    "a function of one's own": lambda: around(RightSquare.apply),
}


@pytest.mark.parametrize("name", few(10, RIGHT))
@pytest.mark.parametrize("dtype", few(1, [torch.float32, torch.float64]))
def test_a_right_model_passes_and_is_left_alone(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = RIGHT[name]().to(dtype)
    inputs, targets = data(dtype)
    inputs[0] = 0
    loss = Objective(model, nn.CrossEntropyLoss(), (inputs, targets))
    before, kept = copy.deepcopy(model.state_dict()), inputs.clone()
    states = torch.get_rng_state(), random.getstate()
    for operator in (Hessian(loss), GaussNewton(loss), GradientCovariance(loss)):
        found, message = compared(operator)
        assert message == ""
        assert found.agrees, found
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(inputs, kept)


def test_a_model_in_lower_precision_passes() -> None:
    loss = objective(RIGHT["relu"](), forward_dtype=torch.bfloat16)
    found, message = compared(Hessian(loss))
    assert (found.agrees, message) == (True, "")


def test_a_model_that_needs_its_own_dtype_is_compared_in_it() -> None:
    function = lambda x: Forgetful.apply(x.float() if x.dtype == torch.float32 else None)  # noqa: E731
    found, message = compared(Hessian(objective(around(function))))
    assert found.dtype == torch.float32
    assert "Forgetful" in message
    right = lambda x: RightSquare.apply(x if x.dtype == torch.float32 else None)  # noqa: E731
    found, message = compared(Hessian(objective(around(right))))
    assert (found.agrees, found.dtype, message) == (True, torch.float32, "")


def test_it_costs_a_few_evaluations_of_a_few_samples() -> None:
    seen: list[int] = []
    model = around(lambda x: seen.append(len(x)) or torch.tanh(x))
    loss = objective(model)
    _ = Hessian(loss) @ torch.ones(loss.num_parameters)
    # The value of both, a product and two gradients; then, of the product that was asked for, the
    # loss twice.
    assert seen == [4] * 7 + [24]
    _ = Hessian(loss) @ torch.ones(loss.num_parameters)
    assert seen[8:] == [24]


class Shared(Reduction):
    """Closes sums with another process, which has failed where it is not `ready`."""

    ready = True

    def gathered(self, text: str) -> list[str]:
        if not self.ready:
            raise InvalidInput("the other has failed")
        return [text, ""]


def test_a_comparison_that_another_process_broke_off_is_made_again() -> None:
    shared = Shared()
    loss = objective(around(Cube.apply), reduction=shared, product="exact")
    vector = torch.ones(loss.num_parameters)
    shared.ready = False
    with pytest.raises(InvalidInput, match="the other has failed"):
        _ = Hessian(loss) @ vector
    shared.ready = True
    with pytest.raises(InvalidInput, match="a product is not that of differences"):
        _ = Hessian(loss) @ vector


class Summed:
    """A loss of the user's own, whose sums are those of all processes."""

    num_parameters, num_samples = 3, 1
    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self) -> None:
        self.inner, self.evaluations = FunctionLoss(lambda t: (t**4).sum(), torch.ones(3)), 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def value_and_gradient(self, *given: Any) -> Any:
        self.evaluations += 1
        return self.inner.value_and_gradient(*given)


@pytest.mark.parametrize("several", [False, True])
def test_sums_of_another_class_are_compared_in_one_process_alone(
    several: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(product_check, "several_processes", lambda: several)
    loss: Any = Summed()
    monkeypatch.setattr(loss.inner, "value", None)
    found = Hessian(loss) @ torch.ones(3)
    assert torch.allclose(found, torch.full((3,), 12.0))
    assert (loss.evaluations == 0) == several
