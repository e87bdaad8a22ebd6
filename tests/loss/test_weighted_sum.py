"""Sums of losses over samples of different numbers, against the dense Hessian of the whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from tests import dense
from tests.sampling import few
from thalweg.errors import InvalidInput
from thalweg.loss.function_loss import FunctionLoss
from thalweg.loss.objective import Objective
from thalweg.loss.weighted_sum import WeightedSum
from thalweg.measure.batch_sharpness import batch_sharpness
from thalweg.measure.watch import watch_loss
from thalweg.operators.gauss_newton import GaussNewton
from thalweg.operators.gradient_covariance import GradientCovariance
from thalweg.operators.hessian import Hessian
from thalweg.optim.split import SplitUpdate
from thalweg.tracking.tracker import SubspaceTracker

INSIDE, EDGE, WEIGHT = 12, 5, 3.0


class _Equation(nn.Module):
    """The residual of an equation inside, of the same network."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_()
        u = self.net(x)
        return torch.autograd.grad(u.sum(), x, create_graph=True)[0].sum(1, keepdim=True) + u


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def _points(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 2, generator=generator, dtype=torch.float64)
    return x, torch.randn(count, 1, generator=generator, dtype=torch.float64)


def _equation_and_boundary(net: nn.Module, chunk_size: int | None = None) -> WeightedSum:
    inside = Objective(_Equation(net), nn.MSELoss(), _points(INSIDE, 1), chunk_size=chunk_size)
    edge = Objective(net, nn.MSELoss(), _points(EDGE, 2), chunk_size=chunk_size)
    return WeightedSum([inside, edge], [1.0, WEIGHT])


def _reference(inside: list[int] | None = None, edge: list[int] | None = None) -> dense.Loss:
    """The same by torch alone, over some points of each kind."""
    net = _network()
    (x, f), (y, g) = _points(INSIDE, 1), _points(EDGE, 2)
    some, few = list(range(INSIDE)) if inside is None else inside, edge
    few = list(range(EDGE)) if few is None else few

    def loss(theta: Tensor) -> Tensor:
        state, begin = {}, 0
        for name, parameter in net.named_parameters():
            end = begin + parameter.numel()
            state[name], begin = theta[begin:end].reshape(parameter.shape), end
        at = x[some].clone().requires_grad_()
        u = functional_call(net, state, (at,))
        slope = torch.autograd.grad(u.sum(), at, create_graph=True)[0].sum(1, keepdim=True)
        boundary = functional_call(net, state, (y[few],))
        return ((slope + u - f[some]) ** 2).mean() + WEIGHT * ((boundary - g[few]) ** 2).mean()

    return loss


def _flat(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()])


@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("keep_graph", few(1, [True, False]))
def test_it_is_the_loss_of_both(chunk_size: int | None, keep_graph: bool) -> None:
    net = _network()
    total, reference, theta = _equation_and_boundary(net, chunk_size), _reference(), _flat(net)
    assert total.num_samples == INSIDE + EDGE
    assert torch.equal(total.theta(), theta)
    for at in (theta, 0.7 * theta):
        value, gradient = total.value_and_gradient(at)
        assert float(value) == pytest.approx(reference(at).item(), abs=1e-13)
        assert float(total.value(at)) == pytest.approx(reference(at).item(), abs=1e-13)
        assert dense.relative(gradient, dense.gradient(reference, at)) < 1e-12
        hessian = Hessian(total, at, keep_graph=keep_graph)
        expected = dense.hessian(reference, at)
        for _ in range(2):
            assert dense.relative(hessian @ torch.eye(len(at)).double(), expected) < 1e-11
        assert dense.relative(hessian.gradient, dense.gradient(reference, at)) < 1e-12


@pytest.mark.parametrize(
    ("samples", "inside", "edge"),
    [
        ([3, 0, 13, 16], [3, 0], [1, 4]),
        ([5, 1], [5, 1], None),
        ([14], None, [2]),
    ],
)
def test_of_some_samples_each_term_has_its_own_and_none_is_left_out(
    samples: list[int], inside: list[int] | None, edge: list[int] | None
) -> None:
    net = _network()
    total, reference, theta = _equation_and_boundary(net), _reference(inside, edge), _flat(net)
    chosen = torch.tensor(samples)
    value = total.value(samples=chosen)
    assert float(value) == pytest.approx(reference(theta).item(), abs=1e-13)
    product = Hessian(total, samples=chosen) @ torch.eye(len(theta)).double()
    assert dense.relative(product, dense.hessian(reference, theta)) < 1e-11


@pytest.mark.slow
def test_on_average_over_random_samples_it_is_right() -> None:
    net = _network()
    total = _equation_and_boundary(net)
    sums, count = torch.zeros(total.num_parameters).double(), 0
    for first in range(total.num_samples):
        for second in range(first):
            sums += total.gradient(samples=torch.tensor([first, second]))
            count += 1
    assert dense.relative(sums / count, total.gradient()) < 1e-12


def test_tasks_with_heads_of_their_own_share_a_trunk() -> None:
    torch.manual_seed(3)
    trunk = nn.Sequential(nn.Linear(2, 3), nn.Tanh()).double()
    heads = [nn.Linear(3, 1).double(), nn.Linear(3, 2).double()]
    data = [_points(7, 4), (_points(9, 5)[0], torch.randint(0, 2, (9,)))]
    losses = [nn.MSELoss(), nn.CrossEntropyLoss()]
    total = WeightedSum(
        [
            Objective(nn.Sequential(trunk, head), loss, pairs)
            for head, loss, pairs in zip(heads, losses, data, strict=True)
        ],
        [1.0, 0.5],
    )
    penalized = torch.cat([p.detach().reshape(-1) for p in total.parameters()])
    parameters = [*trunk.parameters(), *heads[0].parameters(), *heads[1].parameters()]
    assert [id(p) for p in total.parameters()] == [id(p) for p in parameters]

    def reference(theta: Tensor) -> Tensor:
        a, b, c, d, e, f = (
            part.reshape(p.shape)
            for part, p in zip(
                theta.split([p.numel() for p in parameters]), parameters, strict=True
            )
        )
        hidden = [torch.tanh(x @ a.T + b) for x, _ in data]
        first = losses[0](hidden[0] @ c.T + d, data[0][1])
        return first + 0.5 * losses[1](hidden[1] @ e.T + f, data[1][1])

    theta = total.theta()
    assert torch.equal(theta, penalized)
    product = Hessian(total) @ torch.eye(len(theta)).double()
    assert dense.relative(product, dense.hessian(reference, theta)) < 1e-11
    total.write(2 * theta)
    assert torch.equal(torch.cat([p.detach().reshape(-1) for p in parameters]), 2 * theta)


def test_a_penalty_is_a_function_of_theta() -> None:
    theta = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    data = FunctionLoss(lambda t: (t**4).sum(), theta)
    penalty = FunctionLoss(lambda t: (t**2).sum(), theta)
    total = WeightedSum([data, penalty], [1.0, 0.1])
    expected = torch.diag(12 * theta**2 + 0.2)
    assert dense.relative(Hessian(total) @ torch.eye(3).double(), expected) < 1e-14


def test_what_is_wrong_in_a_term_is_named_there() -> None:
    net = _network()
    weighted = nn.utils.parametrizations.weight_norm(nn.Linear(2, 1).double())
    wrong = Objective(weighted, nn.MSELoss(), _points(EDGE, 2), product="exact")
    total = WeightedSum([Objective(net, nn.MSELoss(), _points(INSIDE, 1)), wrong])
    with pytest.raises(InvalidInput, match="weight_norm"):
        _ = Hessian(total) @ total.theta()
    wrong.choice.given = "auto"
    assert Hessian(total).product_with_error(total.theta())[1] is not None
    assert wrong.product == "difference"
    noisy = Objective(net, lambda z, y: (z - y + torch.randn(())).square().mean(), _points(EDGE, 2))
    with pytest.raises(InvalidInput, match="random numbers"):
        WeightedSum([noisy]).value()


class _Stopped(nn.Module):
    """A right term whose derivative is not that of differences, for it holds a value."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        u = self.net(x)
        return u * u.detach()


def test_a_term_that_holds_values_is_right() -> None:
    net = _network()
    x, y = _points(INSIDE, 1)
    total = WeightedSum([Objective(_Stopped(net), nn.MSELoss(), (x, y))])
    held = net(x).detach()

    def reference(theta: Tensor) -> Tensor:
        state, begin = {}, 0
        for name, parameter in net.named_parameters():
            end = begin + parameter.numel()
            state[name], begin = theta[begin:end].reshape(parameter.shape), end
        return ((functional_call(net, state, (x,)) * held - y) ** 2).mean()

    theta = _flat(net)
    product = Hessian(total) @ torch.eye(len(theta)).double()
    assert dense.relative(product, dense.hessian(reference, theta)) < 1e-11


@pytest.mark.parametrize("operator", [GaussNewton, GradientCovariance])
def test_operators_that_look_inside_of_a_model_are_refused(operator: type) -> None:
    with pytest.raises(InvalidInput, match=r"loss: got 'WeightedSum'.*Objective"):
        operator(_equation_and_boundary(_network()))


def test_unfit_sums_are_refused() -> None:
    net = _network()
    one = Objective(net, nn.MSELoss(), _points(EDGE, 2))
    with pytest.raises(InvalidInput, match="losses: got"):
        WeightedSum([])
    for weights in ([1.0, 2.0], [float("nan")]):
        with pytest.raises(InvalidInput, match="weights: got"):
            WeightedSum([one], weights)
    single = FunctionLoss(lambda t: t.sum() ** 2, torch.ones(2))
    with pytest.raises(InvalidInput, match=r"dtypes torch\.float32, torch\.float64"):
        WeightedSum([one, single])
    total = WeightedSum([one])
    with pytest.raises(InvalidInput, match="theta: got"):
        total.value(torch.ones(3).double())
    with pytest.raises(InvalidInput, match="samples: got"):
        total.value(samples=torch.tensor([EDGE]))


def test_a_split_and_a_watcher_follow_it() -> None:
    net = _network()
    total, reference = _equation_and_boundary(net), _reference()
    tracker = SubspaceTracker(total, k=2, error=0.05)
    optimizer = SplitUpdate(torch.optim.SGD(net.parameters(), lr=0.02), tracker, dominant=0.0)
    with watch_loss(total, optimizer, k=1, every=2, exact=True, quiet=True) as watcher:
        sharpness = []
        for _ in range(3):
            before = total.theta()
            curvature = torch.linalg.eigh(dense.hessian(reference, before))
            sharpness.append(float(curvature.eigenvalues[-1]))
            full = -0.02 * dense.gradient(reference, before)
            for parameter, part in zip(
                net.parameters(),
                (-full / 0.02).split([p.numel() for p in net.parameters()]),
                strict=True,
            ):
                parameter.grad = part.reshape(parameter.shape)
            optimizer.step()
            top = curvature.eigenvectors[:, -2:]
            expected = full - top @ (top.T @ full)
            assert float((total.theta() - before - expected).norm() / full.norm()) < 0.1
    found = [row["sharpness"] for row in watcher.history]
    assert found == pytest.approx([sharpness[0], sharpness[2]], rel=1e-3)
    assert not any(row["failure"] for row in watcher.history)


def test_its_state_is_that_of_the_terms_and_a_tracker_resumes() -> None:
    total = _equation_and_boundary(_network(), 4)
    tracker = SubspaceTracker(total, k=1)
    tracker.update()
    state = tracker.state_dict()
    other = _equation_and_boundary(_network(), 8)
    resumed = SubspaceTracker(other, k=1)
    resumed.load_state_dict(state)
    assert [term.loss.chunk_size for term in other.terms] == [4, 4]  # type: ignore[attr-defined]
    assert torch.equal(tracker.update().basis, resumed.update().basis)


def test_batches_of_all_points_have_the_curvature_of_the_whole() -> None:
    total = _equation_and_boundary(_network())
    theta, reference = total.theta(), _reference()
    gradient = dense.gradient(reference, theta)
    curvature = gradient @ dense.hessian(reference, theta) @ gradient / gradient.square().sum()
    found = batch_sharpness(total, INSIDE + EDGE, batches=2)
    assert found.value == pytest.approx(float(curvature), rel=1e-9)
