"""Losses that draw random numbers, which a seed fixes: against the same draw made by hand."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tests import dense
from tests.sampling import few
from thalweg.errors import InvalidInput
from thalweg.loss.function_loss import FunctionLoss
from thalweg.loss.lockstep_objective import LockstepObjective
from thalweg.loss.objective import Objective
from thalweg.measure.watch import watch
from thalweg.operators.gauss_newton import GaussNewton
from thalweg.operators.gradient_covariance import GradientCovariance
from thalweg.operators.hessian import Hessian
from thalweg.optim.split import SplitUpdate
from thalweg.tracking.tracker import SubspaceTracker

SEED, BETWEEN = 7, 1_000_003


class _Autoencoder(nn.Module):
    """A VAE; in evaluation mode it samples too."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(3, 4), nn.Linear(2, 3)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encoder(inputs).chunk(2, -1)
        noise = torch.randn_like(mean)
        return self.decoder(mean + noise * (log_variance / 2).exp()), mean, log_variance


def _evidence(output: tuple[Tensor, Tensor, Tensor], target: Tensor) -> Tensor:
    decoded, mean, log_variance = output
    divergence = (mean**2 + log_variance.exp() - log_variance - 1).sum(1) / 2
    return ((decoded - target) ** 2).sum(1).mean() + divergence.mean()


class _StochasticDepth(nn.Module):
    """Layers left out by Python's generator, noise of NumPy's, dropout of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))

    def forward(self, inputs: Tensor) -> Tensor:
        for layer in self.layers:
            inputs = inputs + float(random.random() < 0.6) * torch.tanh(layer(inputs))
        inputs = inputs * float(np.random.uniform(0.5, 1.5))
        return functional.dropout(inputs, 0.3) + self.layers[0](inputs)


def _dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Dropout(0.4), nn.Linear(5, 3))


class _Recomputed(nn.Module):
    """Evaluates a part again in the backward pass, where the same is to be drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = _dropout()

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + checkpoint(self.inside, inputs, use_reentrant=False)


class _Recurrent(nn.Module):
    """Dropout inside of a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(3, 3, num_layers=2, dropout=0.4, batch_first=True)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(torch.stack([inputs, -inputs], 1))[0][:, -1]


CASES: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "dropout": (_dropout, nn.MSELoss()),
    "checkpoint": (_Recomputed, nn.MSELoss()),
    "recurrent": (_Recurrent, nn.MSELoss()),
    "VAE": (_Autoencoder, _evidence),
    "stochastic depth": (_StochasticDepth, nn.MSELoss()),
}


def _made(name: str) -> tuple[nn.Module, Any, tuple[Tensor, Tensor]]:
    build, loss = CASES[name]
    torch.manual_seed(0)
    inputs = torch.randn(10, 3, dtype=torch.float64)
    return build().double(), loss, (inputs, inputs.flip(0))


def _by_hand(
    model: nn.Module, loss: Any, data: tuple[Tensor, Tensor], size: int, rows: Any = None
) -> dense.Loss:
    """The mean over chunks, before each of which all generators are seeded; torch alone."""
    inputs, target = data
    rows = list(range(len(inputs))) if rows is None else rows

    def value(theta: Tensor) -> Tensor:
        state, begin, total = {}, 0, torch.zeros((), dtype=theta.dtype)
        for name, parameter in model.named_parameters():
            end = begin + parameter.numel()
            state[name], begin = theta[begin:end].reshape(parameter.shape), end
        for at in range(0, len(rows), size):
            chunk = rows[at : at + size]
            torch.manual_seed(SEED + BETWEEN * chunk[0])
            np.random.seed((SEED + BETWEEN * chunk[0]) % 2**32)
            random.seed(SEED + BETWEEN * chunk[0])
            output = functional_call(model, state, (inputs[chunk],))
            total = total + len(chunk) / len(rows) * loss(output, target[chunk])
        return total

    return value


def _states() -> tuple[Any, ...]:
    return (
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),  # type: ignore[index]
    )


@pytest.mark.parametrize("name", few(2, CASES))
@pytest.mark.parametrize("chunk_size", few(1, [4, None]))
def test_value_and_derivatives_are_those_of_the_draw(name: str, chunk_size: int | None) -> None:
    model, loss, data = _made(name)
    reference = _by_hand(model, loss, data, chunk_size or 10)
    theta = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    expected = dense.hessian(reference, theta)
    objective = Objective(model, loss, data, chunk_size=chunk_size, seed=SEED)
    before = _states()
    value, gradient = objective.value_and_gradient()
    assert abs(float(value - reference(theta))) < 1e-13
    assert float(objective.value()) == float(value)
    before = _states()
    assert dense.relative(gradient, dense.gradient(reference, theta)) < 1e-11
    before = _states()
    product = Hessian(objective) @ torch.eye(len(theta)).double()
    assert _states() == before
    assert dense.relative(product, expected) < 1e-10


@pytest.mark.parametrize("vectorize_up_to", [0, None, 100])
def test_neither_vectorizing_nor_the_order_of_samples_changes_the_draw(
    vectorize_up_to: int | None,
) -> None:
    model, loss, data = _made("dropout")
    objective = Objective(
        model, loss, data, chunk_size=4, seed=SEED, vectorize_up_to=vectorize_up_to
    )
    theta = objective.theta()
    rows = [8, 1, 5, 2, 9]
    reference = _by_hand(model, loss, data, 4, rows)
    chosen = torch.tensor(rows)
    torch.manual_seed(99)
    product = Hessian(objective, samples=chosen) @ torch.eye(len(theta)).double()
    assert dense.relative(product, dense.hessian(reference, theta)) < 1e-10
    whole = _by_hand(model, loss, data, 4)
    assert abs(float(objective.value() - whole(theta))) < 1e-13


def test_batches_that_cannot_be_joined_and_whole_ones() -> None:
    model, loss, (inputs, target) = _made("dropout")
    theta = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    batches = [(inputs[:6], target[:6]), (inputs[6:], target[6:])]
    whole = Objective(model.train(), loss, batches, mode="train", seed=SEED)
    total = torch.zeros(()).double()
    for number, batch in enumerate(batches):
        torch.manual_seed(SEED + BETWEEN * number)
        total = total + loss(model(batch[0]), batch[1]).detach() / 2
    assert abs(float(whole.value() - total)) < 1e-13
    texts = [(x, ["a"] * len(x), y) for x, y in batches]

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = model

        def forward(self, inputs: Tensor, texts: list[str]) -> Tensor:
            return self.inside(inputs)

    separate = Objective(Named(), loss, texts, seed=SEED)
    chosen = torch.tensor([7, 1, 9, 0])
    parts = [_by_hand(model, loss, (inputs, target), 2, rows) for rows in ([1, 0], [7, 9])]
    expected = (parts[0](theta) + parts[1](theta)) / 2
    assert abs(float(separate.value(samples=chosen) - expected)) < 1e-13


def test_gauss_newton_and_the_covariance_of_gradients() -> None:
    model, loss, data = _made("dropout")
    objective = Objective(model, loss, data, seed=SEED)
    theta, eye = objective.theta(), torch.eye(objective.num_parameters).double()
    rows = torch.stack(
        [dense.gradient(_by_hand(model, loss, data, 1, [i]), theta) for i in range(10)]
    )
    covariance = (rows - rows.mean(0)).T @ (rows - rows.mean(0)) / 10
    assert dense.relative(GradientCovariance(objective) @ eye, covariance) < 1e-10

    def outputs(at: Tensor) -> Tensor:
        kept: list[Tensor] = []

        def keep(output: Tensor, _: Tensor) -> Tensor:
            kept.append(output)
            return output.sum()

        _by_hand(model, keep, data, 10)(at)
        return kept[0]

    jacobian = torch.autograd.functional.jacobian(outputs, theta).reshape(30, -1)
    expected = jacobian.T @ jacobian * 2 / 30
    assert dense.relative(GaussNewton(objective) @ eye, expected) < 1e-10


@pytest.mark.parametrize("name", CASES)
def test_without_a_seed_it_is_refused_and_the_seed_is_the_mend(name: str) -> None:
    model, loss, data = _made(name)
    with pytest.raises(InvalidInput, match="seed="):
        Objective(model, loss, data).value()
    if name == "dropout":
        with pytest.raises(InvalidInput, match=r"layer '2' \(Dropout\).*mode='eval'.*seed="):
            Objective(model, loss, data)


def test_a_generator_of_its_own_is_fixed_by_no_seed() -> None:
    generator = torch.Generator().manual_seed(0)

    class Own(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input + torch.randn(input.shape, generator=generator))

    objective = Objective(Own(3, 3), nn.MSELoss(), (torch.ones(8, 3), torch.ones(8, 3)), seed=1)
    with pytest.raises(InvalidInput, match=r"changes from call to call.*generators of torch"):
        objective.value()


@pytest.mark.parametrize("name", ["dropout", "VAE"])
def test_a_sum_over_samples_is_found_though_it_is_random(name: str) -> None:
    model, loss, data = _made(name)
    summed = lambda output, target: loss(output, target) * len(target)  # noqa: E731
    objective = Objective(model, summed, data, chunk_size=4, seed=SEED)
    with pytest.raises(InvalidInput, match="it is a sum"):
        objective.value()
    theta = objective.theta()
    whole = Objective(model, summed, data, chunk_size=None, seed=SEED)
    assert abs(float(whole.value() - _by_hand(model, summed, data, 10)(theta))) < 1e-12


def test_ignored_targets_are_counted_though_it_is_random() -> None:
    torch.manual_seed(0)
    model = _dropout().double()
    target = torch.randint(0, 3, (12,))
    target[[0, 1, 2, 7]] = -100
    data = torch.randn(12, 3).double(), target

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(output, target)

    objective = Objective(model, loss, data, chunk_size=4, seed=SEED)
    expected = 0.0
    for at in (0, 4, 8):
        torch.manual_seed(SEED + BETWEEN * at)
        part = slice(at, at + 4)
        counted = int((target[part] != -100).sum())
        expected += loss(model(data[0][part]), target[part]).item() * counted / 8
    assert float(objective.value()) == pytest.approx(expected, abs=1e-13)


def test_the_seed_is_part_of_the_state() -> None:
    model, loss, data = _made("dropout")
    saved = Objective(model, loss, data, seed=SEED).state_dict()
    again = Objective(copy.deepcopy(model), loss, data, seed=SEED)
    again.load_state_dict(saved)
    with pytest.raises(InvalidInput, match="seed: got 8, allowed: 7"):
        Objective(model, loss, data, seed=8).load_state_dict(saved)
    assert "seed" not in Objective(model.eval(), loss, data).state_dict()


def test_runs_in_lockstep_are_refused_by_name() -> None:
    model, loss, data = _made("dropout")
    with pytest.raises(InvalidInput, match="seed: got 7, allowed: None for runs in lockstep"):
        LockstepObjective(Objective(model, loss, data, seed=SEED))


def test_a_function_of_theta_draws_the_same_numbers() -> None:
    theta = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)

    def function(at: Tensor) -> Tensor:
        return ((at + torch.randn(3, dtype=torch.float64)) ** 4).sum()

    loss = FunctionLoss(function, theta, seed=SEED)
    before = torch.get_rng_state()
    product = Hessian(loss) @ torch.eye(3).double()
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(SEED)
    noise = torch.randn(3, dtype=torch.float64)
    assert dense.relative(product, torch.diag(12 * (theta + noise) ** 2)) < 1e-12
    assert float(loss.value()) == pytest.approx(float(((theta + noise) ** 4).sum()), abs=1e-12)
    with pytest.raises(InvalidInput, match="seed"):
        _ = Hessian(FunctionLoss(function, theta)) @ theta


def test_a_split_takes_out_the_subspace_of_the_draw() -> None:
    model, loss, data = _made("VAE")
    objective = Objective(model, loss, data, seed=SEED)
    reference, theta = _by_hand(model, loss, data, 10), objective.theta()
    tracker = SubspaceTracker(objective, k=2, exact=True)
    optimizer = SplitUpdate(torch.optim.SGD(model.parameters(), lr=0.05), tracker, dominant=0.0)
    torch.manual_seed(5)
    loss(model(data[0]), data[1]).backward()
    full = -0.05 * torch.cat([p.grad.reshape(-1) for p in model.parameters()])  # type: ignore
    optimizer.step()
    vectors = torch.linalg.eigh(dense.hessian(reference, theta)).eigenvectors[:, -2:]
    expected = full - vectors @ (vectors.T @ full)
    assert float((objective.theta() - theta - expected).norm() / full.norm()) < 1e-3


def test_watch_has_the_same_draw_at_each_report_and_leaves_the_training_its_own() -> None:
    trained, drawn = [], []
    for watched in (False, True):
        model, loss, data = _made("dropout")
        reference = _by_hand(model, loss, data, 10)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        options: dict[str, Any] = {"k": 1, "every": 1, "exact": True, "quiet": True}
        watcher = None
        if watched:
            watcher = watch(
                model, loss, data, optimizer, mode="train", seed=SEED, **options
            ).__enter__()
        torch.manual_seed(11)
        for _ in range(3):
            theta = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
            if watched:
                state = torch.get_rng_state()
                curvature = dense.hessian(reference, theta)
                torch.set_rng_state(state)
                drawn.append(float(torch.linalg.eigvalsh(curvature)[-1]))
            optimizer.zero_grad()
            loss(model(data[0]), data[1]).backward()
            optimizer.step()
        trained.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
        if watcher is not None:
            found = [row["sharpness"] for row in watcher.history]
            assert found == pytest.approx(drawn, rel=1e-3)
            watcher.close()
    assert torch.equal(*trained)
    model, loss, data = _made("VAE")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InvalidInput, match="seed="):
        watch(model, loss, data, optimizer, k=1, quiet=True)


def test_a_wrong_second_derivative_is_found_though_it_is_random() -> None:
    torch.manual_seed(0)

    class Held(torch.autograd.Function):
        """A right gradient, and a second derivative that leaves out a term."""

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.tanh()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * (1 - ctx.saved_tensors[0].detach().tanh() ** 2)

    class Layer(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return Held.apply(super().forward(input))  # type: ignore[no-any-return]

    model = nn.Sequential(Layer(3, 5), nn.Dropout(0.3), nn.Linear(5, 3))
    data = torch.randn(12, 3), torch.randn(12, 3)
    objective = Objective(model, nn.MSELoss(), data, seed=SEED, product="exact")
    with pytest.raises(InvalidInput, match=r"Held .* in layer '0'"):
        _ = Hessian(objective) @ objective.theta()
