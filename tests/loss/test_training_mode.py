"""Batch norm in training mode over fixed batches: the mean of the batches' losses, and no other."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from tests import dense
from tests.sampling import few
from thalweg.errors import InvalidInput
from thalweg.loss.lockstep_objective import LockstepObjective
from thalweg.loss.objective import Objective
from thalweg.measure.watch import watch
from thalweg.operators.gauss_newton import GaussNewton
from thalweg.operators.gradient_covariance import GradientCovariance
from thalweg.operators.hessian import Hessian
from thalweg.optim.split import SplitUpdate
from thalweg.tracking.tracker import SubspaceTracker

Batches = list[tuple[Tensor, Tensor]]
LOSS = nn.CrossEntropyLoss()


def _model(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4, **options), nn.Tanh(), nn.Linear(4, 3)
    ).double()


def _convolutional() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Unflatten(1, (1, 3)),
        nn.Conv1d(1, 2, 2),
        nn.BatchNorm1d(2),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(4, 3),
    ).double()


def _batches(sizes: tuple[int, ...] = (6, 5, 9)) -> Batches:
    generator = torch.Generator().manual_seed(2)
    kind: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    return [
        (torch.randn(n, 3, **kind), torch.randint(0, 3, (n,), generator=generator)) for n in sizes
    ]


def _flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def _loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Callable[[Tensor], Tensor]:
    """One batch's loss by torch alone, of a model that is in the mode that is meant."""

    def loss(theta: Tensor) -> Tensor:
        named, state, begin = dict(model.named_parameters()), {}, 0
        for name, parameter in named.items():
            end = begin + parameter.numel()
            state[name], begin = theta[begin:end].reshape(parameter.shape), end
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        return LOSS(functional_call(model, state | buffers, (batch[0],)), batch[1])

    return loss


def _mean(model: nn.Module, batches: Batches, weights: Tensor | None = None) -> dense.Loss:
    losses = [_loss_of(model, batch) for batch in batches]
    weights = torch.ones(len(batches)) if weights is None else weights
    return lambda theta: (
        sum(w * f(theta) for w, f in zip(weights, losses, strict=True)) / sum(weights)
    )  # type: ignore[return-value]


@pytest.mark.parametrize("build", [_model, _convolutional])
@pytest.mark.parametrize("chunk_size", few(2, [2, "auto", None, 1]))
@pytest.mark.parametrize("training", few(1, [True, False]))
def test_it_is_the_mean_of_the_batches_losses(build: Any, chunk_size: Any, training: bool) -> None:
    model, batches = build(), _batches()
    reference = _mean(copy.deepcopy(model).train(), batches)
    model.train(training)
    before = copy.deepcopy(model.state_dict())
    loss = Objective(model, LOSS, batches, mode="train", chunk_size=chunk_size)
    theta = _flat(model)
    assert loss.num_samples == 3
    value, gradient = loss.value_and_gradient()
    assert abs(float(value - reference(theta))) < 1e-14
    assert float(loss.value()) == float(loss.value()) == float(value)
    assert dense.relative(gradient, dense.gradient(reference, theta)) < 1e-12
    expected = dense.hessian(reference, theta)
    assert dense.relative(Hessian(loss) @ torch.eye(len(theta)).double(), expected) < 1e-11
    assert all(module.training == training for module in model.modules())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_it_differs_from_evaluation_mode_and_from_all_samples_in_one_batch() -> None:
    model, batches = _model(), _batches()
    trained = Objective(model, LOSS, batches, mode="train").value()
    evaluated = Objective(model, LOSS, batches, mode="eval").value()
    joined = [tuple(map(torch.cat, zip(*batches, strict=True)))]
    together = Objective(model, LOSS, joined, mode="train").value()
    assert min(abs(float(trained - other)) for other in (evaluated, together)) > 1e-3


def test_some_batches_and_weights_of_batches() -> None:
    model, batches = _model().train(), _batches()
    theta, chosen = _flat(model), torch.tensor([2, 0])
    some = Objective(model, LOSS, batches, mode="train").linearize(samples=chosen)
    reference = _mean(model, [batches[2], batches[0]])
    assert dense.relative(some.gradient(), dense.gradient(reference, theta)) < 1e-12
    sizes = torch.tensor([6.0, 5.0, 9.0]).double()
    weighed = Objective(model, LOSS, batches, mode="train", batch_weight=lambda b: len(b[0]))
    reference = _mean(model, batches, sizes)
    assert abs(float(weighed.value() - reference(theta))) < 1e-14
    assert dense.relative(weighed.gradient(), dense.gradient(reference, theta)) < 1e-12


def test_layers_that_are_held_out_of_training_stay_so() -> None:
    model, batches = _model().train(), _batches()
    model[1](torch.randn(20, 4).double() * 3 + 1)
    model[1].eval()
    reference = _mean(copy.deepcopy(model), batches)
    loss = Objective(model, LOSS, batches, mode="train")
    values = [float(loss.value())]
    model.eval()
    values.append(float(loss.value()))
    model.train()
    values.append(float(loss.value()))
    assert values == pytest.approx([float(reference(_flat(model)))] * 3, abs=1e-14)


def test_without_running_statistics() -> None:
    model, batches = _model(track_running_stats=False), _batches()
    loss, theta = Objective(model, LOSS, batches, mode="train"), _flat(model)
    reference = _mean(copy.deepcopy(model).train(), batches)
    assert dense.relative(loss.gradient(), dense.gradient(reference, theta)) < 1e-12
    with pytest.raises(InvalidInput, match=r"without running statistics.*list of batches"):
        Objective(model, LOSS, batches)


def test_gauss_newton_and_the_covariance_of_the_batches_gradients() -> None:
    model, batches = _model().train(), _batches()
    loss, theta = Objective(model, LOSS, batches, mode="train"), _flat(model)
    eye = torch.eye(len(theta)).double()
    newton, gradients = torch.zeros(len(theta), len(theta)).double(), []
    for inputs, target in batches:
        gradients.append(dense.gradient(_loss_of(model, (inputs, target)), theta))

        def outputs(at: Tensor, inputs: Tensor = inputs) -> Tensor:
            named, state, begin = dict(model.named_parameters()), {}, 0
            for name, parameter in named.items():
                end = begin + parameter.numel()
                state[name], begin = at[begin:end].reshape(parameter.shape), end
            return functional_call(model, state, (inputs,))

        z = outputs(theta).detach()
        jacobian = torch.autograd.functional.jacobian(outputs, theta).reshape(z.numel(), -1)

        def of_outputs(flat: Tensor, z: Tensor = z, target: Tensor = target) -> Tensor:
            return LOSS(flat.reshape(z.shape), target)

        curvature = torch.autograd.functional.hessian(of_outputs, z.reshape(-1))
        newton += jacobian.T @ curvature @ jacobian / len(batches)
    assert dense.relative(GaussNewton(loss) @ eye, newton) < 1e-10
    rows = torch.stack(gradients)
    covariance = (rows - rows.mean(0)).T @ (rows - rows.mean(0)) / len(batches)
    assert dense.relative(GradientCovariance(loss) @ eye, covariance) < 1e-10
    with pytest.raises(InvalidInput, match="batch_size"):
        _ = GradientCovariance(loss, batch_size=3) @ eye


@pytest.mark.parametrize("as_loader", [False, True])
def test_where_batches_are_not_given_the_layer_and_the_mend_are_named(as_loader: bool) -> None:
    inputs, target = _batches((12,))[0]
    data: Any = (inputs, target)
    if as_loader:
        data = DataLoader(TensorDataset(inputs, target), batch_size=4)
    with pytest.raises(InvalidInput, match=r"layer '1' \(BatchNorm1d\).*list of batches"):
        Objective(_model(), LOSS, data, mode="train")
    with pytest.raises(InvalidInput, match=r"layer '1' \(BatchNorm1d\).*mode='train'"):
        Objective(_model(), LOSS, [(inputs, target)])
    if as_loader:
        taken = Objective.from_batches(_model(), LOSS, data, n=2, mode="train")
        reference = _mean(_model().train(), [(x, y) for x, y in data][:2])
        assert abs(float(taken.value() - reference(_flat(_model())))) < 1e-14


def test_a_loss_that_compares_the_samples_of_a_batch() -> None:
    """A contrastive loss is none of samples, but one of batches."""
    torch.manual_seed(3)
    model, batches = nn.Linear(3, 2).double(), _batches((6, 6))

    def contrastive(output: Tensor, _: Tensor) -> Tensor:
        similar = output @ output.T - 1e9 * torch.eye(len(output))
        return nn.functional.cross_entropy(similar, torch.arange(len(output)).roll(1))

    expected = sum(contrastive(model(x), y).item() for x, y in batches) / 2
    loss = Objective(model, contrastive, batches, mode="train")
    assert float(loss.value()) == pytest.approx(expected, abs=1e-12)
    with pytest.raises(InvalidInput, match=r"list of batches with mode='train'"):
        Objective(model, contrastive, batches, chunk_size=4).value()


def test_runs_in_lockstep_share_batches_and_have_none_of_their_own() -> None:
    model, batches = _model(), _batches()
    loss = Objective(model, LOSS, batches, mode="train")
    theta = loss.theta()
    thetas = torch.stack([theta, 1.1 * theta])
    values, gradients = LockstepObjective(loss).values_and_gradients(thetas)
    reference = _mean(copy.deepcopy(model).train(), batches)
    for row in range(2):
        assert abs(float(values[row] - reference(thetas[row]))) < 1e-13
        expected = dense.gradient(reference, thetas[row])
        assert dense.relative(gradients[row], expected) < 1e-12
    with pytest.raises(InvalidInput, match="batches"):
        LockstepObjective(loss).values_and_gradients(thetas, torch.tensor([[0, 1], [1, 2]]))


def test_a_split_takes_out_the_subspace_of_the_batches() -> None:
    model, batches = _model(), _batches((6,) * 9)
    loss = Objective(model, LOSS, batches, mode="train")
    tracker = SubspaceTracker(loss, k=2, exact=True)
    optimizer = SplitUpdate(torch.optim.SGD(model.parameters(), lr=0.05), tracker, dominant=0.0)
    for step in range(2):
        inputs, target = batches[step]
        before = loss.theta()
        model.zero_grad()
        LOSS(model.train()(inputs), target).backward()
        optimizer.step()
        reference = _mean(copy.deepcopy(model), batches)
        vectors = torch.linalg.eigh(dense.hessian(reference, before)).eigenvectors[:, -2:]
        update = loss.theta() - before
        full = -0.05 * dense.gradient(_loss_of(model, batches[step]), before)
        bulk = full - vectors @ (vectors.T @ full)
        assert float((update - bulk).norm() / full.norm()) < 1e-3


def test_watch_reports_the_sharpness_of_the_loss_that_is_trained() -> None:
    model, batches = _model().train(), _batches((6,) * 9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    expected = []
    with watch(
        model, LOSS, batches, optimizer, every=2, k=2, mode="train", exact=True, quiet=True
    ) as watcher:
        for step in range(3):
            reference = _mean(copy.deepcopy(model), batches)
            curvature = dense.hessian(reference, _flat(model))
            expected.append(float(torch.linalg.eigvalsh(curvature)[-1]))
            optimizer.zero_grad()
            LOSS(model(batches[step][0]), batches[step][1]).backward()
            optimizer.step()
    assert [row["step"] for row in watcher.history] == [0, 2]
    found = [row["sharpness"] for row in watcher.history]
    assert found == pytest.approx([expected[0], expected[2]], rel=1e-3)


def test_watch_takes_some_of_the_batches_whole() -> None:
    model, batches = _model().train(), _batches((6,) * 9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    watcher = watch(
        model, LOSS, batches, optimizer, k=2, mode="train", samples=4, seed=1, quiet=True
    )
    drawn = torch.randperm(9, generator=torch.Generator().manual_seed(1))[:4].sort().values
    reference = _mean(copy.deepcopy(model), [batches[i] for i in drawn.tolist()])
    with watcher:
        assert watcher.objective.num_samples == 4
        assert abs(float(watcher.objective.value() - reference(_flat(model)))) < 1e-13
