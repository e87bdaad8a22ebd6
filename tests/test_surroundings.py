"""What surrounds a call changes no bit of its result, and stands again afterwards."""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import thalweg
from tests.sampling import few
from thalweg.loss.function_loss import FunctionLoss
from thalweg.loss.objective import Objective
from thalweg.measure.watch import watch
from thalweg.operators.gauss_newton import GaussNewton
from thalweg.operators.gradient_covariance import GradientCovariance
from thalweg.operators.hessian import Hessian
from thalweg.optim.split import SplitUpdate
from thalweg.spectrum.eigensolver import top_eigenpairs
from thalweg.spectrum.trace_estimation import trace
from thalweg.surroundings import shielded
from thalweg.tracking.tracker import SubspaceTracker

torch.manual_seed(0)
MODEL = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
DATA = (torch.randn(40, 6), torch.randint(0, 3, (40,)))
LOSS = nn.CrossEntropyLoss()
OBJECTIVE = Objective(MODEL, LOSS, DATA)
BLOCK = torch.randn(OBJECTIVE.num_parameters, 3)
THETA = OBJECTIVE.theta() + 0.1 * BLOCK[:, 0]
GRADIENT = OBJECTIVE.gradient()
SUBSPACE = top_eigenpairs(Hessian(OBJECTIVE), 2)
ONES = torch.ones(4, 3)
ROTATION = torch.nn.utils.parametrizations.orthogonal(nn.Linear(3, 3), orthogonal_map="cayley")
ROTATED = Objective(nn.Sequential(nn.Linear(6, 3), ROTATION), LOSS, DATA)


class FunctionMode(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class DispatchMode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def low_precision() -> Iterator[None]:
    torch.set_float32_matmul_precision("medium")
    try:
        yield
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def autocast_in_inference() -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        yield
        assert torch.is_autocast_enabled("cpu")
        assert torch.is_inference_mode_enabled()


def rounding_hooks() -> AbstractContextManager[Any]:
    def pack(tensor: Tensor) -> Tensor:
        return tensor.bfloat16() if tensor.dtype == torch.float32 else tensor

    def unpack(tensor: Tensor) -> Tensor:
        return tensor.float() if tensor.dtype == torch.bfloat16 else tensor

    return saved_tensors_hooks(pack, unpack)


SURROUNDINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "autocast in inference mode": autocast_in_inference,
    "no_grad": torch.no_grad,
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    # As a default device that is not the model's, with data nowhere.
    "default device": lambda: torch.device("meta"),
    "anomaly detection": lambda: torch.autograd.set_detect_anomaly(True),
    "low precision": low_precision,
    "deterministic algorithms": deterministic,
    "hooks on saved tensors": rounding_hooks,
    "save_on_cpu": save_on_cpu,
    "no hooks": lambda: torch.autograd.graph.disable_saved_tensors_hooks("none here"),
    "cached parametrizations": parametrize.cached,
    "function mode": FunctionMode,
    "dispatch mode": DispatchMode,
}

USUAL = ["autocast in inference mode", "default dtype bfloat16", "default device"]
USUAL += ["hooks on saved tensors", "dispatch mode"]


def trained() -> Tensor:
    model = copy.deepcopy(MODEL)
    # Which way to multiply is the faster one would be told by a clock, and rounding by the way.
    objective = Objective(model, LOSS, DATA, vectorize_up_to=0)
    source = SubspaceTracker(objective, 2)
    optimizer = SplitUpdate(torch.optim.SGD(model.parameters(), lr=0.5), source, 0.0, 1.0)
    for _ in range(2):
        parts = objective.layout.unflatten(objective.gradient())
        for parameter, part in zip(model.parameters(), parts, strict=True):
            parameter.grad = part.clone()
        optimizer.step()
    return objective.theta()


def watched() -> Tensor:
    model = copy.deepcopy(MODEL)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with watch(model, LOSS, DATA, optimizer, k=2, every=1, quiet=True) as watcher:
        parts = OBJECTIVE.layout.unflatten(GRADIENT)
        for parameter, part in zip(model.parameters(), parts, strict=True):
            parameter.grad = part.clone()
        optimizer.step()
    row = watcher.history[0]
    return torch.tensor([row["loss"], row["sharpness"]], dtype=torch.float64, device="cpu")


def turned() -> Tensor:
    with torch.no_grad():
        ROTATION(torch.zeros(1, 3, device="cpu", dtype=torch.float32))  # fills a cache, if any
    return ROTATED.gradient(ROTATED.theta() * 2)


def quartic() -> Tensor:
    loss = FunctionLoss(lambda theta: (ONES @ theta).pow(4).mean(), BLOCK[:3, 0])
    return loss.linearize().multiply(BLOCK[:3].T.contiguous()) + loss.value_and_gradient()[1]


CALLS: dict[str, Callable[[], Tensor]] = {
    "value": lambda: OBJECTIVE.value(THETA),
    "gradient": lambda: OBJECTIVE.gradient(THETA),
    "Hessian": lambda: Hessian(OBJECTIVE, THETA, keep_graph=True) @ BLOCK,
    "GaussNewton": lambda: GaussNewton(OBJECTIVE, THETA) @ BLOCK,
    "GradientCovariance": lambda: GradientCovariance(OBJECTIVE, batch_size=5) @ BLOCK,
    "eigenpairs": lambda: top_eigenpairs(Hessian(OBJECTIVE, THETA), 2).project(GRADIENT),
    "trace": lambda: torch.tensor(
        trace(Hessian(OBJECTIVE)).value, dtype=torch.float64, device="cpu"
    ),
    "project": lambda: SUBSPACE.project(BLOCK),
    "split": lambda: SUBSPACE.split(GRADIENT)[1],
    "training": trained,
    "watch": watched,
    "parametrization": turned,
    "function": quartic,
}


@pytest.fixture(scope="module")
def outside() -> dict[str, Tensor]:
    return {name: call().detach().clone() for name, call in CALLS.items()}


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize("surrounding", few(5, dict.fromkeys([*USUAL, *SURROUNDINGS])))
def test_results_are_the_same_bit_for_bit(surrounding: str, outside: dict[str, Tensor]) -> None:
    for name, call in CALLS.items():
        with SURROUNDINGS[surrounding]():
            found = call()
        assert found.dtype == outside[name].dtype, name
        assert torch.equal(found.detach().cpu(), outside[name]), name


def test_a_float32_model_has_float32_results_whatever_the_default() -> None:
    with default_dtype(torch.float64):
        assert OBJECTIVE.value().dtype == OBJECTIVE.gradient().dtype == torch.float32


def test_a_nan_is_reported_as_one_within_anomaly_detection() -> None:
    objective = Objective(MODEL, lambda output, target: output.sqrt().mean(), DATA)
    with (
        torch.autograd.set_detect_anomaly(True),
        pytest.raises(thalweg.errors.Diverged, match="NaN"),
    ):
        objective.gradient()


def test_what_was_in_force_is_so_again_after_a_failure() -> None:
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        with pytest.raises(KeyError, match=r"\(False, True\)"), shielded():
            raise KeyError((torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))
        assert torch.is_autocast_enabled("cpu")
        assert not torch.is_grad_enabled()


class Padded(nn.Module):
    """A Transformer with padded positions, which torch evaluates on a fast path without a graph."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder, self.last = nn.TransformerEncoder(layer, 2), nn.Linear(8, 3)

    def forward(self, inputs: Tensor, mask: Tensor) -> Tensor:
        return self.last(self.encoder(inputs, src_key_padding_mask=mask).mean(1))


class AsksForAGraph(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(input)
        return output if torch.is_grad_enabled() and output.requires_grad else 2 * output


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", ["transformer", "asks"])
def test_the_value_is_that_of_the_function_that_is_differentiated(kind: str) -> None:
    torch.manual_seed(0)
    mask = torch.zeros(10, 5, dtype=torch.bool)
    mask[:5, 3:] = True
    targets = torch.randint(0, 3, (10,))
    if kind == "transformer":
        model, inputs = Padded().eval(), (torch.randn(10, 5, 8), mask)
    else:
        model, inputs = AsksForAGraph(4, 3), (torch.randn(10, 4),)
    objective = Objective(model, LOSS, (*inputs, targets))
    expected = LOSS(model(*inputs), targets)
    with torch.no_grad():
        value = objective.value()
    assert value == objective.value_and_gradient()[0]
    assert torch.allclose(value, expected.detach(), rtol=1e-6)
    # A line through the loss has the slope that the gradient says.
    wide = Objective(model.double(), LOSS, (inputs[0].double(), *inputs[1:], targets))
    theta, gradient = wide.theta(), wide.gradient()
    step = 1e-5 * gradient / gradient.norm()
    slope = (wide.value(theta + step) - wide.value(theta - step)) / 2e-5
    assert torch.allclose(slope, gradient.norm(), rtol=1e-6)


def test_every_new_tensor_of_the_engine_says_where_it_is() -> None:
    """A default device of the user's is not to decide."""
    makers = {"zeros", "ones", "empty", "full", "tensor", "as_tensor", "arange", "eye"}
    makers |= {"randn", "rand", "randperm", "randint", "linspace"}
    root = Path(thalweg.__file__).parent
    rooms = ("loss", "operators", "spectrum", "tracking", "optim", "measure")
    files = [root / "linalg.py", *(path for room in rooms for path in (root / room).rglob("*.py"))]
    missing = []
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and isinstance(node.func.value, ast.Name)
                and node.func.value.id == "torch"
                and node.func.attr in makers
                and not any(keyword.arg in ("device", None) for keyword in node.keywords)
            ):
                missing.append(f"{path.name}:{node.lineno}")
    assert not missing
