"""Each row of a diagnosis is wrong on a model with that fault, and right on models without."""

from __future__ import annotations

import copy
import itertools
import random
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

import thalweg
from tests.sampling import few
from thalweg.errors import InvalidInput
from thalweg.loss.function_loss import FunctionLoss
from thalweg.loss.objective import Objective
from thalweg.measure.diagnosis import Diagnosis, Finding, diagnose
from thalweg.measure.diagnosis_checks import CHECKS, GAUSS_NEWTON, Subject, definite

LOSS = nn.CrossEntropyLoss()
NAMES = [name for name, *_ in CHECKS]


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(12, 4, generator=generator), torch.arange(12) % 3


class Layer(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def around(layer: nn.Module | Callable[[Tensor], Tensor]) -> nn.Sequential:
    torch.manual_seed(0)
    inner = layer if isinstance(layer, nn.Module) else Layer(layer)
    return nn.Sequential(nn.Linear(4, 8), inner, nn.Linear(8, 3))


def diagnosed(model: Any, loss: Any = LOSS, **options: Any) -> Diagnosis:
    dtype = next(model.parameters()).dtype
    x, y = data()
    return diagnose(Objective(model, loss, (x.to(dtype), y), **options))


def wrong(found: Diagnosis) -> list[str]:
    return [row.check for row in found.rows if row.verdict == "wrong"]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.reshape(-1, 2, 4)).reshape(-1, 8)


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(5, 4, padding_idx=0, sparse=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table((x.abs() * 3).long() % 5)).mean(1))


class Convolutions(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Unflatten(1, (1, 2, 2)),
            nn.Conv2d(1, 4, 2, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(4, 3),
        )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: around(nn.ReLU()),
    "gelu": lambda: around(nn.GELU()),
    "layer norm": lambda: around(nn.LayerNorm(8)),
    "group norm": lambda: around(nn.GroupNorm(2, 8)),
    "attention": lambda: around(Attention()),
    "embedding": Words,
    "max pooling": Convolutions,
    "linear": lambda: nn.Linear(4, 3),
    "dropout": lambda: around(nn.Dropout(0.5)),
}


@pytest.mark.parametrize("dtype", few(1, [torch.float32, torch.float64]))
@pytest.mark.parametrize("name", few(6, MODELS))
def test_nothing_is_wrong_with_right_models(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    found = diagnosed(MODELS[name]().to(dtype), mode="eval")
    assert wrong(found) == [], str(found)
    assert found.ok
    assert [row.check for row in found.rows] == [*NAMES, "left as it was"]
    assert all(isinstance(row, Finding) and row.seconds >= 0 for row in found.rows)
    unknown = [row.check for row in found.rows if row.verdict == "not checked"]
    assert not unknown, str(found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nothing_is_wrong_with_parameters_of_low_precision(dtype: torch.dtype) -> None:
    found = diagnosed(around(nn.Tanh()).to(dtype))
    assert found.ok, str(found)
    assert "evaluated in float32" in found["dtypes"].found


def test_nothing_is_wrong_with_batches_that_weigh_differently() -> None:
    x, y = data()
    y[:5] = -100

    def tokens(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target)

    batches = [(x[i : i + 4], y[i : i + 4]) for i in (0, 4, 8)]
    found = diagnose(Objective(around(nn.Tanh()), tokens, batches))
    assert found.ok, str(found)
    assert "over 1 that are not -100" in found["mean over samples"].found
    named = [{"x": a, "labels": b} for a, b in batches]
    model = Named()
    found = diagnose(Objective(model, lambda o, b: tokens(o, b["labels"]), named))
    assert found.ok, str(found)


class Named(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 3)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return super().forward(x)


class Counting(nn.Module):
    """Changes with each call, by memory."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = itertools.count()

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + next(self.calls))


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0].exp()


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Halved(torch.autograd.Function):
    """The cosine, and half of it in its own backward pass where that is vectorized."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, x: Tensor) -> Tensor:
        return grad * x.cos()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, of_this: Tensor) -> tuple[Tensor, Tensor]:
        grad, x = ctx.saved_tensors
        return Cosine.apply(of_this, x), -of_this * grad * x.sin()  # type: ignore[return-value]


class Cosine(torch.autograd.Function):
    @staticmethod
    def forward(grad: Tensor, x: Tensor) -> Tensor:
        return grad * x.cos()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None: ...

    @staticmethod
    def vmap(info: Any, in_dims: Any, grad: Tensor, x: Tensor) -> Any:
        return grad * x.cos() / 2, 0


class Sine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return Halved.apply(grad, ctx.saved_tensors[0])  # type: ignore[return-value]


class Itself(nn.Linear):
    """Another function where its weight is not the very one that it was built with."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.own = [self.weight]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 if self.weight is self.own[0] else 2)


class Behind(nn.Linear):
    """Reads its weight by another road too, without a graph."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.own = [self.weight]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * (1 + self.own[0].detach().mean()))


class Remembering(nn.Module):
    """Writes in place into a tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = torch.zeros(1)

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return x


def summed(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, reduction="sum")


DERIVATIVES = [
    "Hessian against differences",
    "symmetry of the Hessian",
    "GaussNewton against differences",
    "GradientCovariance against gradients",
]

FAULTS: list[tuple[Callable[[], nn.Module], Any, list[str], str]] = [
    (lambda: nn.Linear(5, 3), LOSS, ["loss"], r"Linear.*shape that the layer"),
    (lambda: around(lambda x: x / 0 * 0), LOSS, ["loss"], "NaN"),
    (lambda: around(lambda x: F.dropout(x)), LOSS, ["loss"], "random numbers"),
    (lambda: around(Counting()), LOSS, ["one batch twice"], "changes from call to call"),
    (
        lambda: around(lambda x: x * random.random()),
        LOSS,
        ["one batch twice"],
        "Python's random",
    ),
    (
        lambda: around(nn.Tanh()),
        summed,
        ["mean over samples", "chunk sizes"],
        "it is a sum: divide it",
    ),
    (
        lambda: around(Itself()),
        LOSS,
        ["gradient against torch's", "gradient at another point"],
        "at its own parameters",
    ),
    (lambda: around(Behind()), LOSS, ["gradient at another point"], "does not follow"),
    (
        lambda: around(StraightThrough.apply),
        LOSS,
        ["gradient against differences", DERIVATIVES[0], DERIVATIVES[2]],
        "not that of its forward pass",
    ),
    (lambda: around(Once.apply), LOSS, DERIVATIVES, r"Once .*layer '1' \(Layer\)"),
    (
        lambda: around(nn.Hardsigmoid()),
        LOSS,
        [DERIVATIVES[0], *DERIVATIVES[2:]],
        r"layer '1' \(Hardsigmoid\).*relu6",
    ),
    (lambda: around(Sine.apply), LOSS, ["vectorized products"], "vectorize_up_to=0"),
    (lambda: around(Remembering()), LOSS, ["left as it was"], "register a buffer"),
]


@pytest.mark.parametrize(("model", "loss", "rows", "hint"), FAULTS)
def test_a_fault_is_a_row_and_no_other(
    model: Callable[[], nn.Module], loss: Any, rows: list[str], hint: str
) -> None:
    found = diagnosed(model(), loss)
    assert wrong(found) == rows, str(found)
    assert not found.ok
    assert any(re.search(hint, row.hint) for row in found.rows)


def test_gauss_newton_that_is_not_semidefinite_is_told() -> None:
    x, y = data()
    concave = Objective(around(nn.Tanh()), lambda o, t: -F.cross_entropy(o, t), (x, y))
    subject = Subject(concave, None, 8)
    assert definite(subject).verdict == "wrong"
    subject.known[GAUSS_NEWTON] = "right"
    assert definite(subject).verdict == "right"
    assert "not convex in the outputs" in diagnose(concave)["GaussNewton is semidefinite"].found
    convex = Subject(Objective(around(nn.Tanh()), LOSS, (x, y)), None, 8)
    assert definite(convex).verdict == "right"


def test_layers_and_settings_are_listed() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.norm = Words(), nn.BatchNorm1d(3)
            self.unused, self.frozen = nn.Linear(2, 2), nn.Linear(3, 3)
            self.frozen.requires_grad_(False)
            self.register_buffer("seen", torch.zeros(1))
            self.seen: Tensor

        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1
            x.mul_(2.0)
            y: Any = checkpoint(self.words, x, use_reentrant=False)
            return self.frozen(self.norm(y))

    model = Listed()
    optimizer = torch.optim.SGD(model.words.parameters(), lr=0.1)
    loss = Objective(nn.DataParallel(model), LOSS, data(), mode="eval")
    found = diagnose(loss, optimizer)
    assert found.ok, str(found)
    assert found["wrappers"].found == "taken off: DataParallel around the model"
    assert "frozen: frozen.weight, frozen.bias" in found["parameters"].found
    assert "not in the optimizer: norm.weight" in found["parameters"].found
    assert "norm (BatchNorm1d)" in found["layers that depend on the mode"].found
    assert found["layers with sparse gradients"].found == "made dense: words.table"
    assert "the batch's '0'" in found["writes in place"].found
    assert "seen" in found["buffers"].found
    assert "unused.weight, unused.bias" in found["unused parameters"].found
    assert "parameters and all" in found["recomputation"].found
    assert diagnosed(around(nn.Tanh()))["recomputation"].found == "none"
    assert float(model.seen) == 0.0


def test_what_was_changed_after_the_objective_was_built_is_told() -> None:
    model = around(nn.Dropout(0.5)).eval()
    loss = Objective(model, LOSS, data())
    model.train()
    assert wrong(diagnose(loss)) == ["layers that depend on the mode", "loss"]
    model.eval().bfloat16()
    assert "dtypes" in wrong(diagnose(loss))
    model.to("meta")
    assert "devices" in wrong(diagnose(loss))
    other = torch.optim.SGD(around(nn.Tanh()).parameters(), lr=0.1)
    stranger = diagnose(Objective(around(nn.Tanh()), LOSS, data()), other)
    assert wrong(stranger) == ["parameters"]


def test_losses_of_other_classes_are_diagnosed_too() -> None:
    right = diagnose(FunctionLoss(lambda t: (t**4).sum(), torch.ones(3)))
    assert right.ok, str(right)
    checked = [row.check for row in right.rows if row.verdict == "right"]
    assert checked == [
        "loss",
        "one batch twice",
        "gradient against differences",
        "Hessian against differences",
        "symmetry of the Hessian",
        "left as it was",
    ]
    once = diagnose(FunctionLoss(lambda t: Once.apply(t).sum(), torch.ones(3)))  # type: ignore
    assert wrong(once) == ["Hessian against differences"]

    class Quadratic:
        """H = diag(1, 2, 3), whose products are those of a wrong one."""

        num_parameters, num_samples = 3, 1
        dtype, device = torch.float64, torch.device("cpu")

        def __init__(self, matrix: Tensor) -> None:
            self.matrix, self.weights = matrix, torch.ones(3, dtype=torch.float64)

        def parameters(self) -> list[Tensor]:
            return [self.weights]

        def theta(self) -> Tensor:
            return self.weights.clone()

        def value_and_gradient(self, theta: Any = None, samples: Any = None) -> Any:
            theta = self.weights if theta is None else theta
            diagonal = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
            return theta @ (diagonal * theta) / 2, diagonal * theta

        def linearize(self, theta: Any = None, samples: Any = None, **_: Any) -> Any:
            outer = self

            class Linear:
                def gradient(self) -> Tensor:
                    return outer.value_and_gradient(theta)[1]

                def multiply(self, rows: Tensor) -> Tensor:
                    return rows @ outer.matrix.T

            return Linear()

    diagonal = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64).diag()
    own: Any = Quadratic(diagonal)
    assert diagnose(own).ok, str(diagnose(own))
    assert not hasattr(own, "_products_checked")
    own = Quadratic(diagonal + torch.eye(3, dtype=torch.float64).roll(1, 0))
    assert wrong(diagnose(own)) == ["Hessian against differences", "symmetry of the Hessian"]


class Stubborn(nn.Module):
    """Cannot be copied, and raises what it likes at its second and later calls."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.inner, self.error, self.calls = nn.Linear(4, 3), error, 0

    def __deepcopy__(self, memo: Any) -> Any:
        raise self.error

    def forward(self, x: Tensor) -> Tensor:
        if len(x) < 12:
            raise self.error
        return self.inner(x)


class Mine(Exception):
    def __str__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize("error", [Mine(), RuntimeError("no"), MemoryError(), StopIteration()])
def test_it_never_raises_for_a_fault_of_the_model(error: Exception) -> None:
    found = diagnosed(Stubborn(error))
    assert found["loss"].verdict == "right"
    assert "not checked" in {row.verdict for row in found.rows}
    assert str(found)


@pytest.mark.parametrize("argument", ["objective", "optimizer", "samples"])
def test_wrong_arguments_are_refused(argument: str) -> None:
    given: dict[str, Any] = {"objective": Objective(nn.Linear(4, 3), LOSS, data())}
    given[argument] = 0
    with pytest.raises(InvalidInput, match=rf"{argument}: got "):
        diagnose(**given)


def test_the_model_is_left_as_it_was() -> None:
    model = around(nn.Sequential(nn.BatchNorm1d(8), nn.Dropout(0.5)))
    LOSS(model(data()[0]), data()[1]).backward()
    model[0].weight.register_hook(lambda grad: 2 * grad)
    before, twin = copy.deepcopy(model.state_dict()), copy.deepcopy(model)
    gradients = [p.grad for p in model.parameters()]
    values = [g.clone() for g in gradients if g is not None]
    torch.manual_seed(7)
    state, python = torch.get_rng_state(), random.getstate()
    with torch.no_grad():
        found = diagnose(Objective(model, LOSS, data(), mode="eval"))
    assert found.ok, str(found)
    assert torch.equal(state, torch.get_rng_state())
    assert python == random.getstate()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    assert all(map(torch.equal, values, [g for g in gradients if g is not None]))
    assert all(module.training for module in model.modules())
    x, y = data()
    torch.manual_seed(0)
    first = LOSS(model(x), y)
    torch.manual_seed(0)
    assert torch.equal(first, LOSS(twin(x), y))


def test_the_table_is_plain_and_aligned() -> None:
    found = diagnosed(around(nn.Hardsigmoid()))
    lines = str(found).splitlines()
    assert f"thalweg {thalweg.__version__}, torch {torch.__version__}, Python 3" in lines[0]
    assert "model Sequential, loss CrossEntropyLoss: P = 67, N = 12" in lines[1]
    assert all(len(line) <= 100 for line in lines)
    assert all(ord(letter) < 128 for letter in str(found))
    head = next(line for line in lines if line.startswith("check "))
    at = head.index("verdict")
    for row in found.rows:
        line = next(line for line in lines if line.startswith(row.check))
        assert line[at:].startswith(row.verdict)
    assert thalweg.diagnose is diagnose
    with pytest.raises(KeyError):
        _ = found["nothing"]
