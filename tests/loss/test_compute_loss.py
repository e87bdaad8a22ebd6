"""A trainer's own `compute(model, batch)`, against the same written out for one flat vector."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from tests import dense
from thalweg.errors import InvalidInput
from thalweg.loss.compute_loss import ComputeLoss
from thalweg.loss.lockstep_objective import LockstepObjective
from thalweg.loss.objective import Objective
from thalweg.measure.watch import watch
from thalweg.operators.gauss_newton import GaussNewton
from thalweg.operators.gradient_covariance import GradientCovariance
from thalweg.operators.hessian import Hessian
from thalweg.optim.split import SplitUpdate
from thalweg.tracking.tracker import SubspaceTracker

N = 10


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        return {"logits": self.net(features)}


class _Trainer:
    """As that of transformers: takes labels out of the batch, and looks at what it holds."""

    def __init__(self, smoothing: float) -> None:
        self.smoothing = smoothing

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False
    ) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = functional.cross_entropy(
            outputs["logits"], labels, label_smoothing=self.smoothing, ignore_index=-100
        )
        return (loss, outputs) if return_outputs else loss


class _Module(nn.Module):
    """As one of Lightning: it is model and step in one."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = _Model()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        features, labels = batch
        return {"loss": functional.cross_entropy(self.inside(features)["logits"], labels)}


def _batch(ignored: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 3, (N,), generator=generator)
    labels[:ignored] = -100
    return {
        "features": torch.randn(N, 3, generator=generator, dtype=torch.float64),
        "labels": labels,
    }


def _flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def _logits(features: Tensor) -> Callable[[Tensor], Tensor]:
    model = _Model()

    def logits(theta: Tensor) -> Tensor:
        state, begin = {}, 0
        for name, parameter in model.named_parameters():
            end = begin + parameter.numel()
            state[name], begin = theta[begin:end].reshape(parameter.shape), end
        return functional_call(model, state, (features,))["logits"]

    return logits


def _reference(smoothing: float, batch: dict[str, Tensor]) -> dense.Loss:
    logits = _logits(batch["features"])
    return lambda theta: functional.cross_entropy(
        logits(theta), batch["labels"], label_smoothing=smoothing
    )


@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("ignored", [0, 3])
def test_that_of_a_trainer_which_takes_the_batch_apart(
    chunk_size: int | None, ignored: int
) -> None:
    model, batch = _Model(), _batch(ignored)
    given = copy.deepcopy(batch)
    compute = ComputeLoss(_Trainer(0.0).compute_loss)
    objective = Objective(model, compute, batch, chunk_size=chunk_size)
    reference, theta = _reference(0.0, batch), _flat(model)
    value, gradient = objective.value_and_gradient()
    assert float(value) == pytest.approx(reference(theta).item(), abs=1e-13)
    assert dense.relative(gradient, dense.gradient(reference, theta)) < 1e-12
    for at in (theta, 1.3 * theta):
        product = Hessian(objective, at) @ torch.eye(len(theta)).double()
        assert dense.relative(product, dense.hessian(reference, at)) < 1e-11
    assert batch.keys() == given.keys()
    assert all(torch.equal(batch[name], given[name]) for name in given)


@pytest.mark.parametrize("chunk_size", [None, 4])
def test_that_of_a_module_which_is_model_and_step(chunk_size: int | None) -> None:
    module, batch = _Module(), _batch()
    data = batch["features"], batch["labels"]
    compute = ComputeLoss(lambda model, batch: model.training_step(batch, 0))
    objective = Objective(module, compute, data, chunk_size=chunk_size)
    reference, theta = _reference(0.0, batch), _flat(module)
    product = Hessian(objective) @ torch.eye(len(theta)).double()
    assert dense.relative(product, dense.hessian(reference, theta)) < 1e-11
    at = 0.5 * theta
    bound = ComputeLoss(lambda _, batch: module.training_step(batch, 0))
    own = Objective(module, bound, data, chunk_size=chunk_size)
    assert float(own.value(at)) == pytest.approx(reference(at).item(), abs=1e-13)
    product = Hessian(own, at) @ torch.eye(len(theta)).double()
    assert dense.relative(product, dense.hessian(reference, at)) < 1e-11


def test_gauss_newton_by_the_outputs_that_come_with_the_loss() -> None:
    model, batch = _Model(), _batch()
    trainer = _Trainer(0.0)
    with_outputs = ComputeLoss(lambda model, batch: trainer.compute_loss(model, batch, True))
    objective = Objective(model, with_outputs, batch)
    theta, logits = objective.theta(), _logits(batch["features"])
    jacobian = torch.autograd.functional.jacobian(logits, theta).reshape(3 * N, -1)

    def of_outputs(flat: Tensor) -> Tensor:
        return functional.cross_entropy(flat.reshape(N, 3), batch["labels"])

    curvature = torch.autograd.functional.hessian(of_outputs, logits(theta).detach().reshape(-1))
    expected = jacobian.T @ curvature @ jacobian
    eye = torch.eye(len(theta)).double()
    assert dense.relative(GaussNewton(objective) @ eye, expected) < 1e-11
    alone = Objective(model, ComputeLoss(trainer.compute_loss), batch)
    with pytest.raises(InvalidInput, match=r"GaussNewton: .*returns a loss and no outputs"):
        _ = GaussNewton(alone) @ theta


def test_covariance_of_gradients_and_runs_in_lockstep() -> None:
    model, batch = _Model(), _batch()
    objective = Objective(model, ComputeLoss(_Trainer(0.0).compute_loss), batch)
    theta = objective.theta()
    rows = torch.stack(
        [
            dense.gradient(
                _reference(0.0, {name: part[i : i + 1] for name, part in batch.items()}), theta
            )
            for i in range(N)
        ]
    )
    expected = (rows - rows.mean(0)).T @ (rows - rows.mean(0)) / N
    eye = torch.eye(len(theta)).double()
    assert dense.relative(GradientCovariance(objective) @ eye, expected) < 1e-11
    thetas = torch.stack([theta, 2 * theta])
    _, gradients = LockstepObjective(objective).values_and_gradients(thetas)
    for at, gradient in zip(thetas, gradients, strict=True):
        assert dense.relative(gradient, dense.gradient(_reference(0.0, batch), at)) < 1e-11


def test_an_equation_that_calls_the_model_itself() -> None:
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    x = torch.rand(N, 2, dtype=torch.float64)

    def residual(model: Any, points: Tensor) -> Tensor:
        points = points.requires_grad_()
        u = model(points)
        return torch.autograd.grad(u.sum(), points, create_graph=True)[0].sum(1) - u[:, 0]

    objective = Objective(
        net, ComputeLoss(lambda model, batch: residual(model, batch[0]).square().mean()), (x,)
    )

    def reference(theta: Tensor) -> Tensor:
        state, begin = {}, 0
        for name, parameter in net.named_parameters():
            end = begin + parameter.numel()
            state[name], begin = theta[begin:end].reshape(parameter.shape), end
        return residual(lambda at: functional_call(net, state, (at,)), x.clone()).square().mean()

    theta = objective.theta()
    with torch.no_grad():
        value = objective.value()
    assert float(value) == pytest.approx(reference(theta).item(), abs=1e-13)
    product = Hessian(objective) @ torch.eye(len(theta)).double()
    assert dense.relative(product, dense.hessian(reference, theta)) < 1e-11


def test_a_split_and_watch_take_it() -> None:
    model, batch = _Model(), _batch()
    trainer = _Trainer(0.1)
    compute = ComputeLoss(trainer.compute_loss)
    reference, theta = _reference(0.1, batch), _flat(model)
    spectrum = torch.linalg.eigh(dense.hessian(reference, theta))
    tracker = SubspaceTracker(Objective(model, compute, batch), k=2, exact=True)
    optimizer = SplitUpdate(torch.optim.SGD(model.parameters(), lr=0.1), tracker, bulk=0.0)
    with watch(model, compute, batch, optimizer, exact=True, quiet=True) as watcher:
        trainer.compute_loss(model, dict(batch)).backward()
        optimizer.step()
    top = spectrum.eigenvectors[:, -2:]
    expected = -0.1 * top @ (top.T @ dense.gradient(reference, theta))
    assert float((_flat(model) - theta - expected).norm() / expected.norm()) < 1e-3
    (row,) = watcher.history
    assert row["sharpness"] == pytest.approx(float(spectrum.eigenvalues[-1]), rel=1e-3)


def test_what_is_no_such_function_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"compute: got 'int'.*\(model, batch\)"):
        ComputeLoss(3)  # type: ignore[arg-type]
    batch = _batch()
    for wrong in (lambda model, batch: None, lambda model, batch: (model, 1)):
        with pytest.raises(InvalidInput, match=r"a scalar or an object with \.loss"):
            Objective(_Model(), ComputeLoss(wrong), batch).value()
    summed = ComputeLoss(lambda model, batch: model(batch["features"])["logits"].square().sum())
    with pytest.raises(InvalidInput, match="it is a sum"):
        Objective(_Model(), summed, batch, chunk_size=4).value()
