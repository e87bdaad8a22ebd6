"""What torch and Python raise inside of model and loss is told with the layer and what helps."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.dense import hessian
from tests.sampling import few
from thalweg.errors import InvalidInput
from thalweg.loss.function_loss import FunctionLoss
from thalweg.loss.lockstep_objective import LockstepObjective
from thalweg.loss.objective import Objective
from thalweg.measure.watch import watch
from thalweg.operators.gauss_newton import GaussNewton
from thalweg.operators.gradient_covariance import GradientCovariance
from thalweg.operators.hessian import Hessian
from thalweg.optim.sam import SAM
from thalweg.optim.split import SplitUpdate
from thalweg.spectrum.density import spectral_density
from thalweg.spectrum.eigensolver import eigenpairs
from thalweg.spectrum.trace_estimation import trace
from thalweg.tracking.gradient_subspaces import GradientSubspace
from thalweg.tracking.tracker import SubspaceTracker

LOSS = nn.CrossEntropyLoss()


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(24, 4, generator=generator), torch.arange(24) % 3


class Layer(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def around(layer: nn.Module | Callable[..., Any]) -> nn.Sequential:
    torch.manual_seed(0)
    inner = layer if isinstance(layer, nn.Module) else Layer(layer)
    return nn.Sequential(nn.Linear(4, 5), nn.Sequential(inner), nn.Linear(5, 3))


def objective(layer: nn.Module | Callable[..., Any], loss: Any = LOSS, **kw: Any) -> Objective:
    return Objective(around(layer), loss, data(), **kw)


def ones(loss: Objective, *shape: int) -> Tensor:
    return torch.ones(loss.num_parameters, *shape)


def message(call: Callable[[], object]) -> str:
    """Of the error that is told, whose cause is the one that was raised."""
    with pytest.raises(InvalidInput) as caught:
        call()
    assert caught.value.__cause__ is not None
    assert "\n" not in str(caught.value)
    return str(caught.value)


def attached(loss: Objective) -> Any:
    optimizer = torch.optim.SGD(loss.model.parameters(), lr=0.1)
    return watch(loss.model, loss.evaluator.loss, data(), optimizer, k=2, quiet=True)


def split_step(loss: Objective) -> None:
    inner = torch.optim.SGD(loss.model.parameters(), lr=0.1)
    optimizer = SplitUpdate(inner, SubspaceTracker(loss, 2), dominant=0.0)
    loss.evaluator.loss(loss.model(data()[0]), data()[1]).backward()
    optimizer.step()


ENTRANCES: dict[str, Callable[[Objective], object]] = {
    "Hessian": lambda loss: Hessian(loss) @ ones(loss),
    "a block": lambda loss: Hessian(loss) @ ones(loss, 5),
    "GaussNewton": lambda loss: GaussNewton(loss) @ ones(loss),
    "GradientCovariance": lambda loss: GradientCovariance(loss) @ ones(loss),
    "eigenpairs": lambda loss: eigenpairs(loss, 1),
    "trace": lambda loss: trace(Hessian(loss)),
    "density": lambda loss: spectral_density(Hessian(loss)),
    "SubspaceTracker": lambda loss: SubspaceTracker(loss, 2).update(),
    "SplitUpdate": split_step,
    "watch": attached,
    "linearize": lambda loss: loss.linearize().multiply(ones(loss)[None]),
}


@pytest.mark.parametrize("check", few(1, [True, False]))
@pytest.mark.parametrize("vectorize_up_to", few(1, [None, 0, 50]))
@pytest.mark.parametrize("entrance", ENTRANCES)
def test_a_layer_without_second_derivative_is_named_with_a_mend_at_every_entrance(
    entrance: str, vectorize_up_to: int | None, check: bool
) -> None:
    loss = objective(nn.Hardsigmoid(), vectorize_up_to=vectorize_up_to, check=check)
    told = message(lambda: ENTRANCES[entrance](loss))
    assert "layer '1.0' (Hardsigmoid) has no second derivative: RuntimeError: deriv" in told
    assert "relu6(x + 3) / 6" in told
    assert "vectorize" not in told


def distances(x: Tensor) -> Tensor:
    return torch.cdist(x, torch.arange(25.0).reshape(5, 5).to(x))


def pairs(x: Tensor) -> Tensor:
    return x * F.pdist(x).mean()


def pairs_written_out(x: Tensor) -> Tensor:
    i, j = torch.triu_indices(len(x), len(x), 1)
    return x * (x[i] - x[j]).norm(dim=1).mean()


def whole(x: Tensor) -> Tensor:
    return torch.segment_reduce(x, "mean", lengths=torch.tensor([len(x)]), axis=0) + x


MENDED: list[tuple[Any, Any]] = [
    (nn.Hardsigmoid(), lambda x: nn.functional.relu6(x + 3) / 6),
    (distances, lambda x: (x.unsqueeze(-2) - torch.arange(25.0).reshape(5, 5).to(x)).norm(dim=-1)),
    (pairs, pairs_written_out),
]


@pytest.mark.parametrize(("layer", "mend"), MENDED, ids=["hardsigmoid", "cdist", "pdist"])
def test_the_mend_that_is_told_is_the_same_function_and_works(layer: Any, mend: Any) -> None:
    failing = objective(layer, product="exact")
    told = message(lambda: Hessian(failing) @ ones(failing))
    assert "is the same" in told
    x, y = data()
    model, other = around(layer).double(), around(mend).double()
    assert torch.allclose(model(x.double()), other(x.double()), rtol=1e-12)
    loss = Objective(other, LOSS, (x.double(), y))
    eigenvalues = eigenpairs(loss, 2, tolerance=1e-8).eigenvalues
    theta = loss.theta()

    def gradient(moved: Tensor) -> Tensor:
        """By the layer that has a first derivative alone."""
        theirs = copy.deepcopy(model)
        nn.utils.vector_to_parameters(moved, theirs.parameters())
        gradients = torch.autograd.grad(LOSS(theirs(x.double()), y), list(theirs.parameters()))
        return torch.cat([g.reshape(-1) for g in gradients])

    steps = 1e-5 * torch.eye(len(theta), dtype=torch.float64)
    dense = torch.stack([(gradient(theta + s) - gradient(theta - s)) / 2e-5 for s in steps])
    expected = torch.linalg.eigvalsh((dense + dense.T) / 2).flip(0)[:2]
    assert torch.allclose(eigenvalues, expected, rtol=1e-5)


def ctc(output: Tensor, target: Tensor) -> Tensor:
    logits = output.log_softmax(1).expand(4, *output.shape)
    ones = torch.ones(len(target), dtype=torch.long)
    return F.ctc_loss(logits, (target % 2 + 1).unsqueeze(1), 4 * ones, ones)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (ctc, "loss 'ctc' has no second derivative: .*ctc_loss.*logsumexp"),
        (nn.MultiMarginLoss(), "loss 'MultiMarginLoss' has no second.*output.gather"),
        (
            lambda o, t: F.multilabel_margin_loss(o, t[:, None].expand(-1, 3)),
            "loss '<lambda>' has no second.*multilabel_margin_loss.*differentiated twice",
        ),
    ],
)
@pytest.mark.parametrize("operator", [Hessian, GaussNewton, GradientCovariance])
def test_a_loss_without_second_derivative_is_named(loss: Any, words: str, operator: Any) -> None:
    failing = objective(nn.Tanh(), loss, product="exact")
    with pytest.raises(InvalidInput, match=words):
        _ = operator(failing) @ ones(failing)
    assert torch.isfinite(failing.gradient()).all()


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sin()


class OnceAlone(torch.autograd.Function):
    """Its backward pass refuses to be differentiated, in words of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise NotImplementedError("once alone")
        return grad * ctx.saved_tensors[0].cos()


class Loud(torch.autograd.Function):
    """torch says at the second derivative that there is none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0].cos()


def in_place(x: Tensor) -> Tensor:
    return x.exp().mul_(2)


FIRST = [
    (NoBackward.apply, "NoBackward .*'1.0' .Layer. has no derivative.*write its backward pass"),
    (in_place, "layer '1.0' .* has no derivative: .*inplace operation.*out of place"),
    (lambda x: torch.special.zeta(x.abs() + 2, 2.0), "'1.0' .Layer. has no derivative.*'zeta'"),
]


@pytest.mark.parametrize(("function", "words"), FIRST)
@pytest.mark.parametrize("operator", [None, Hessian, GaussNewton, GradientCovariance])
def test_what_has_no_first_derivative_is_named(function: Any, words: str, operator: Any) -> None:
    loss = objective(function)
    with pytest.raises(InvalidInput, match=words):
        _ = loss.gradient() if operator is None else operator(loss) @ ones(loss)
    assert torch.isfinite(loss.value())


def test_a_function_that_refuses_a_second_derivative_is_named() -> None:
    loss = objective(OnceAlone.apply, product="exact")
    told = message(lambda: Hessian(loss) @ ones(loss))
    assert "OnceAlone (a torch.autograd.Function) in layer '1.0'" in told
    assert "NotImplementedError: once alone" in told


def test_a_kernel_of_attention_that_the_model_insists_on_is_told() -> None:
    def fused(x: Tensor) -> Tensor:
        heads = x.reshape(-1, 1, 5, 1)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(heads, heads, heads).reshape(-1, 5)

    def left_alone(x: Tensor) -> Tensor:
        heads = x.reshape(-1, 1, 5, 1)
        return F.scaled_dot_product_attention(heads, heads, heads).reshape(-1, 5)

    insisting = objective(fused, product="exact")
    told = message(lambda: Hessian(insisting) @ ones(insisting))
    assert "layer '1.0'" in told
    assert "sdpa_kernel away" in told
    mended = objective(left_alone)
    assert torch.isfinite(Hessian(mended) @ ones(mended)).all()


def test_gauss_newton_is_right_where_zeros_have_no_derivative() -> None:
    """The backward pass of logcumsumexp takes logarithms of what it gets."""
    torch.manual_seed(0)
    x, y = data()
    model = nn.Sequential(nn.Linear(4, 3), Layer(lambda z: torch.logcumsumexp(z, 1))).double()
    loss = Objective(model, LOSS, (x.double(), y))
    names = [name for name, _ in model.named_parameters()]
    sizes = [p.numel() for p in model.parameters()]
    shapes = [p.shape for p in model.parameters()]

    def outputs(theta: Tensor) -> Tensor:
        parts = zip(names, theta.split(sizes), shapes, strict=True)
        state = {name: part.reshape(shape) for name, part, shape in parts}
        logits = x.double() @ state["0.weight"].T + state["0.bias"]
        return torch.stack([logits[:, : i + 1].exp().sum(1).log() for i in range(3)], 1)

    theta = loss.theta()
    z = outputs(theta).detach()
    jacobian = torch.autograd.functional.jacobian(outputs, theta)
    middle = hessian(lambda flat: LOSS(flat.reshape(24, 3), y), z.reshape(-1))
    rows = jacobian.reshape(72, -1)
    found = GaussNewton(loss) @ torch.eye(len(theta), dtype=torch.float64)
    assert torch.allclose(found, rows.T @ middle @ rows, atol=1e-12)
    each = []
    for i in range(24):
        value = F.cross_entropy(outputs(theta.requires_grad_())[i : i + 1], y[i : i + 1])
        each.append(torch.autograd.grad(value, theta)[0])
    gradients = torch.stack(each)
    centered = gradients - gradients.mean(0)
    covariance = GradientCovariance(loss) @ torch.eye(len(theta), dtype=torch.float64)
    assert torch.allclose(covariance, centered.T @ centered / 24, atol=1e-12)


class Named(nn.Module):
    """Asks for its weight in the ways that torch has."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.get_parameter("inner.weight")
        assert isinstance(self.inner.bias, nn.Parameter)
        return F.linear(x, weight, self.inner.bias)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_stands_in_for_a_parameter_is_told_as_one(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, y = data()
    model = Named().to(dtype)
    plain = copy.deepcopy(model.inner)
    loss, expected = (Objective(m, LOSS, (x.to(dtype), y)) for m in (model, plain))
    other = loss.theta() + 0.1
    assert torch.equal(loss.gradient(other), expected.gradient(other))
    vector = ones(loss).to(loss.dtype)
    assert torch.allclose(Hessian(loss, other) @ vector, Hessian(expected, other) @ vector)
    products = (GradientCovariance(each) @ vector for each in (loss, expected))
    assert torch.allclose(*products)


class TwoInputs(nn.Linear):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return super().forward(x * mask)


FORWARD: list[tuple[nn.Module, Any, Any, str]] = [
    (nn.Linear(5, 3), LOSS, None, r"the model \(Linear\) fails.*float32 \(24, 4\).*shape that the"),
    (nn.Linear(4, 2), LOSS, None, r"loss 'CrossEntropyLoss' fails.*from 0 to 2; classes are numb"),
    (nn.Linear(4, 3), nn.BCEWithLogitsLoss(), None, r"'BCEWithLogitsLoss'.*output\.squeeze"),
    (nn.Linear(4, 3), LOSS, lambda x, y: (x, y.double()), r"loss .*float64 \(24,\)"),
    (nn.Linear(4, 3), LOSS, lambda x, y: (x.double(), y), r"Linear.*one dtype"),
    (TwoInputs(4, 3), LOSS, None, r"TwoInputs.*missing.*'mask'.*a batch is \(inputs"),
    (nn.Sequential(nn.Embedding(3, 4)), LOSS, None, r"layer '0' \(Embedding\).*inputs\.long\(\)"),
    (
        nn.Sequential(nn.Embedding(3, 4), nn.Flatten()),
        LOSS,
        lambda x, y: (y[:, None] + 5, y),
        r"layer '0' \(Embedding\).*IndexError.*from 5 to 7; .*num_embeddings",
    ),
    (nn.Linear(4, 3), lambda output: output.mean(), None, r"loss '<lambda>'.*loss\(output, targ"),
    (nn.Linear(4, 3), lambda o, t: o.nothing, None, r"loss '<lambda>' fails: AttributeError"),
    (nn.Sequential(nn.Linear(4, 3), Layer(lambda x: [x][3])), LOSS, None, r"layer '1'.*IndexErr"),
    (nn.Sequential(nn.Linear(4, 3), Layer(lambda x: {}["a"])), LOSS, None, r"layer '1'.*KeyErr"),
    (nn.Sequential(nn.Linear(4, 3), Layer(lambda x: 1 // 0)), LOSS, None, r"'1'.*ZeroDivision"),
]


@pytest.mark.parametrize(("model", "criterion", "made", "words"), FORWARD)
def test_what_fails_in_a_forward_pass_is_named(
    model: nn.Module, criterion: Any, made: Any, words: str
) -> None:
    x, y = data() if made is None else made(*data())
    calls: list[Callable[[Objective], object]] = [
        lambda loss: loss.value(),
        lambda loss: loss.gradient(),
        lambda loss: Hessian(loss) @ ones(loss),
        lambda loss: GaussNewton(loss) @ ones(loss),
        lambda loss: SubspaceTracker(loss, 2).update(),
    ]
    for call in calls:
        with pytest.raises(InvalidInput, match=words) as caught:
            call(Objective(model, criterion, (x, y)))
        assert caught.value.__cause__ is not None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    words = words.replace("24,", "8,").replace("from 0 to 2", "from [0-2] to 2")
    with pytest.raises(InvalidInput, match=words):
        watch(model, criterion, (x, y), optimizer, k=2, quiet=True)


class Mine(Exception):
    pass


@pytest.mark.parametrize("kind", [Mine, KeyboardInterrupt, MemoryError, UserWarning, OSError])
def test_what_is_none_of_torchs_or_pythons_passes_as_it_is(kind: type[BaseException]) -> None:
    raised = kind("mine")

    def fails(x: Tensor) -> Tensor:
        raise raised

    for call in (lambda o: o.value(), lambda o: Hessian(o) @ ones(o)):
        with pytest.raises(kind) as caught:
            call(objective(fails, check=False, chunk_size=1))
        assert caught.value is raised


def test_an_error_of_the_data_is_not_laid_on_the_model() -> None:
    class Rows(torch.utils.data.Dataset[Any]):
        missing = False

        def __len__(self) -> int:
            return 8

        def __getitem__(self, i: int) -> tuple[Tensor, int]:
            if Rows.missing:
                raise LookupError("row is missing")
            return torch.ones(4), i % 3

    loss = Objective(nn.Linear(4, 3), LOSS, Rows(), check=False)
    Rows.missing = True
    with pytest.raises(LookupError, match="row is"):
        loss.value()


def test_other_entrances_tell_it_too() -> None:
    loss = objective(nn.Tanh(), nn.MultiMarginLoss())
    runs = LockstepObjective(objective(in_place))
    thetas = torch.stack([loss.theta()] * 2)
    assert "out of place" in message(lambda: runs.values_and_gradients(thetas))
    assert "Linear" in message(
        lambda: GradientSubspace(
            Objective(nn.Linear(5, 3), LOSS, data(), check=False), 2, samples=4
        ).update()
    )


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda t: F.hardsigmoid(t).sum(), "second derivative fails.*relu6"),
        (lambda t: torch.special.zeta(t.abs() + 2, 2.0).sum(), "derivative fails.*zeta"),
        (lambda t: t.nothing, "its value fails: AttributeError.*nothing"),
        (lambda: 0.0, r"its value fails: TypeError.*function\(theta\)"),
    ],
)
def test_a_plain_function_is_named(function: Any, words: str) -> None:
    loss = FunctionLoss(function, torch.ones(3))
    with pytest.raises(InvalidInput, match=rf"function '<lambda>': .*{words}") as caught:
        eigenpairs(loss, 1)
    assert caught.value.__cause__ is not None


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_a_module_of_torchscript_is_watched() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.jit.script(around(nn.Tanh()))
    plain = around(nn.Tanh())
    x, y = data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, LOSS, (x, y), optimizer, every=1, quiet=True) as watcher:
        LOSS(model(x), y).backward()
        optimizer.step()
    expected = eigenpairs(Objective(plain, LOSS, (x, y)), 1, tolerance=1e-6).eigenvalues[0]
    assert watcher.history[0]["sharpness"] == pytest.approx(float(expected), rel=1e-3)


def test_a_closure_of_sam_raises_what_it_raises() -> None:
    model = around(nn.Tanh())
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1))

    def closure() -> Tensor:
        raise RuntimeError("the closure's own")

    with pytest.raises(RuntimeError, match="the closure's own"):
        optimizer.step(closure)


def test_trying_layers_leaves_no_trace() -> None:
    loss = objective(nn.Hardsigmoid())
    loss.model.register_buffer("seen", torch.zeros(1))
    before = copy.deepcopy(loss.model.state_dict())
    state = torch.get_rng_state()
    message(lambda: Hessian(loss) @ ones(loss))
    assert torch.equal(state, torch.get_rng_state())
    after = loss.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(p.grad is None for p in loss.model.parameters())
    assert not any(m._forward_pre_hooks for m in loss.model.modules())
