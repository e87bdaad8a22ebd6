"""A bare class of the protocol's members drives everything, against a dense Hessian in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import dense
from thalweg import registry
from thalweg.errors import InvalidInput
from thalweg.loss.function_loss import FunctionLoss
from thalweg.loss.objective import Objective
from thalweg.loss.protocol import Linearization, Loss, value_of
from thalweg.measure.batch_sharpness import batch_sharpness
from thalweg.measure.preconditioned_sharpness import preconditioned_sharpness
from thalweg.measure.step_state import StepState
from thalweg.measure.watcher import Watcher
from thalweg.operators.gauss_newton import GaussNewton, ResidualHessian
from thalweg.operators.gradient_covariance import GradientCovariance
from thalweg.operators.hessian import Hessian
from thalweg.operators.preconditioned import Preconditioned
from thalweg.optim.split import SplitUpdate
from thalweg.spectrum.density import spectral_density
from thalweg.spectrum.eigensolver import eigenpairs, top_eigenpairs
from thalweg.spectrum.subspace import random_subspace
from thalweg.spectrum.trace_estimation import trace
from thalweg.tracking.baselines import NextEigenspace
from thalweg.tracking.batch_subspace import BatchSubspace
from thalweg.tracking.gradient_subspaces import GradientSubspace
from thalweg.tracking.optimizer_metric import OptimizerMetricSource
from thalweg.tracking.preconditioner import preconditioner
from thalweg.tracking.source import FixedSubspace, SubspaceSource
from thalweg.tracking.tracker import SubspaceTracker

INPUTS, HIDDEN, SAMPLES, K = 4, 5, 96, 2
P = INPUTS * HIDDEN + HIDDEN


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([4.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    inputs = torch.randn(SAMPLES, INPUTS, generator=generator, dtype=torch.float64) * scale
    return inputs, torch.randn(SAMPLES, generator=generator, dtype=torch.float64)


def mean_loss(theta: Tensor, samples: Tensor | None = None) -> Tensor:
    """Half the mean squared error of a small tanh network, written out."""
    inputs, targets = (part if samples is None else part[samples] for part in data())
    first, last = theta[: INPUTS * HIDDEN].reshape(INPUTS, HIDDEN), theta[INPUTS * HIDDEN :]
    return (torch.tanh(inputs @ first / 4) @ last - targets).square().mean() / 2


class Bare:
    """Exactly the protocol's members."""

    num_parameters, num_samples = P, SAMPLES
    dtype, device = torch.float64, torch.device("cpu")

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        # In two tensors of unlike shapes.
        self._first = torch.randn(INPUTS, HIDDEN, generator=generator, dtype=torch.float64)
        self._last = torch.randn(HIDDEN, generator=generator, dtype=torch.float64)
        for part in (self._first, self._last):
            part.requires_grad_()

    def parameters(self) -> list[Tensor]:
        return [self._first, self._last]

    def theta(self) -> Tensor:
        return torch.cat([part.detach().reshape(-1) for part in self.parameters()])

    @torch.no_grad()
    def write(self, theta: Tensor) -> None:
        self._first.copy_(theta[: INPUTS * HIDDEN].reshape(INPUTS, HIDDEN))
        self._last.copy_(theta[INPUTS * HIDDEN :])

    def value_and_gradient(
        self, theta: Tensor | None = None, samples: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        theta = self.theta() if theta is None else theta
        return mean_loss(theta, samples), dense.gradient(lambda t: mean_loss(t, samples), theta)

    def linearize(
        self,
        theta: Tensor | None = None,
        samples: Tensor | None = None,
        *,
        keep_graph: bool = False,
    ) -> Linearization:
        return BareLinearization(self.theta() if theta is None else theta, samples)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        assert not state


class BareLinearization:
    def __init__(self, theta: Tensor, samples: Tensor | None) -> None:
        self._theta = theta.detach().clone().requires_grad_()
        with torch.enable_grad():
            loss = mean_loss(self._theta, samples)
            (self._gradient,) = torch.autograd.grad(loss, self._theta, create_graph=True)

    def gradient(self) -> Tensor:
        return self._gradient.detach()

    def multiply(self, rows: Tensor) -> Tensor:
        return torch.stack(
            [
                torch.autograd.grad(self._gradient, self._theta, row, retain_graph=True)[0]
                for row in rows
            ]
        )


def function_loss() -> FunctionLoss:
    return FunctionLoss(mean_loss, Bare().theta(), SAMPLES)


LOSSES: dict[str, Callable[[], Loss]] = {"bare": Bare, "function": function_loss}


@pytest.fixture(params=LOSSES)
def loss(request: pytest.FixtureRequest) -> Loss:
    return LOSSES[request.param]()


def reference(theta: Tensor, samples: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Eigenvalues, descending, and eigenvectors of the dense Hessian."""
    matrix = dense.hessian(lambda t: mean_loss(t, samples), theta)
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(0), vectors.flip(1)


def missing(basis: Tensor, theta: Tensor, k: int = K) -> float:
    """How much of the true dominant subspace a basis leaves out: the sine of the largest angle."""
    true = reference(theta)[1][:, :k]
    return float(torch.linalg.matrix_norm(true - basis @ (basis.T @ true), ord=2))


def test_the_bare_class_has_the_members_of_the_protocol_and_no_other() -> None:
    wanted = {name for name in vars(Loss) if not name.startswith("_")}
    assert {name for name in dir(Bare()) if not name.startswith("_")} == wanted
    assert wanted <= set(dir(function_loss()))
    assert wanted <= set(dir(Objective))


def test_the_hessian_is_that_of_the_dense_reference(loss: Loss) -> None:
    samples = torch.arange(0, SAMPLES, 3)
    for chosen in (None, samples):
        matrix = dense.hessian(lambda t, chosen=chosen: mean_loss(t, chosen), loss.theta())
        hessian = Hessian(loss, samples=chosen)
        assert torch.allclose(hessian @ torch.eye(P, dtype=torch.float64), matrix, atol=1e-12)
        assert hessian.num_matvecs == P
        assert torch.allclose(hessian.gradient, loss.value_and_gradient(samples=chosen)[1])


def test_eigenpairs_trace_and_density_take_a_loss_for_its_hessian(loss: Loss) -> None:
    values, _ = reference(loss.theta())
    found = eigenpairs(loss, K, tolerance=1e-8)
    assert torch.allclose(found.eigenvalues, values[:K], rtol=1e-10)
    assert missing(found.basis, loss.theta()) < 1e-6
    assert torch.equal(top_eigenpairs(loss, K, tolerance=1e-8).basis, found.basis)
    assert trace(loss, num_matvecs=P).value == pytest.approx(float(values.sum()))
    estimate = trace(loss, num_matvecs=18, known=found)
    assert abs(estimate.value - float(values.sum())) < 5 * estimate.standard_error
    spectrum = spectral_density(loss, probes=2, steps=P)
    assert spectrum.extremes[1] == pytest.approx(float(values[0]), rel=1e-8)


def test_a_tracker_follows_and_continues_from_its_saved_state(loss: Loss) -> None:
    def descend() -> None:
        loss.write(loss.theta() - 0.02 * loss.value_and_gradient()[1])

    tracker = SubspaceTracker(loss, K, error=0.02, seed=3)
    errors = []
    for _ in range(10):
        errors.append(missing(tracker.update().basis, loss.theta()))
        descend()
    assert max(errors) < 0.05
    again = SubspaceTracker(loss, K, error=0.02, seed=3)
    again.load_state_dict(tracker.state_dict())
    assert torch.equal(again.subspace.basis, tracker.subspace.basis)
    for _ in range(5):
        assert torch.equal(again.update().basis, tracker.update().basis)
        assert again.report.error == tracker.report.error
        descend()
    assert torch.allclose(tracker.gradient(), loss.value_and_gradient()[1])


def test_an_optimizer_is_split_along_the_subspace(loss: Loss) -> None:
    tracker = SubspaceTracker(loss, K, bulk_error=0.05)
    optimizer = SplitUpdate(torch.optim.SGD(loss.parameters(), lr=0.05), tracker, 0.0, 1.0)
    begin = float(value_of(loss))
    for _ in range(5):
        before = loss.theta()
        gradient = loss.value_and_gradient()[1]
        set_gradient(loss, gradient)
        optimizer.step()
        true = reference(before)[1][:, :K]
        wanted = -0.05 * (gradient - true @ (true.T @ gradient))
        made = loss.theta() - before
        assert float((made - wanted).norm() / wanted.norm()) < 0.1
    assert float(value_of(loss)) < begin


def set_gradient(loss: Loss, gradient: Tensor) -> None:
    parts = gradient.split([p.numel() for p in loss.parameters()])
    for parameter, part in zip(loss.parameters(), parts, strict=True):
        parameter.grad = part.reshape(parameter.shape)


def test_every_probe_that_looks_at_the_loss_alone_measures_it(loss: Loss) -> None:
    tracker = SubspaceTracker(loss, K, exact=True)
    adam = torch.optim.Adam(loss.parameters(), lr=0.01)
    before, gradient = loss.theta(), loss.value_and_gradient()[1]
    set_gradient(loss, gradient)
    adam.step()
    made = loss.theta() - before
    generator = torch.Generator().manual_seed(0)
    state = StepState(
        1,
        before,
        loss,
        tracker,
        0.01,
        minibatch_loss=float(value_of(loss, before)),
        minibatch_gradient=gradient,
        proposed=made,
        update=made,
        optimizer=adam,
        batches=lambda count: [
            torch.randint(0, SAMPLES, (8,), generator=generator) for _ in range(count)
        ],
        k=K,
    )
    looks_inside = {"curvature_energy"}
    row: dict[str, Any] = {}
    for name, probe in registry.probes.items():
        if name not in looks_inside:
            row.update(probe.measure(state))
    values, vectors = reference(before)
    assert row["loss"] == pytest.approx(float(mean_loss(before)))
    assert row["sharpness"] == pytest.approx(float(values[0]), rel=1e-5)
    true = vectors[:, :K]
    wanted = float((true.T @ gradient).norm() / gradient.norm())
    assert row["alignment_gradient"] == pytest.approx(wanted, rel=1e-3)
    assert state.metric_subspace is not None
    diagonal = preconditioner(adam, loss.parameters())
    assert torch.equal(state.metric_subspace.diagonal, diagonal)
    scaled = Preconditioned(Hessian(loss, before), diagonal) @ torch.eye(P, dtype=torch.float64)
    top = float(torch.linalg.eigvalsh(scaled)[-1])
    found = preconditioned_sharpness(loss, adam, before, tolerance=1e-6)
    assert float(found.eigenvalues[0]) == pytest.approx(top, rel=1e-8)


def test_the_other_sources_take_it_too(loss: Loss) -> None:
    below = NextEigenspace(loss, K, tolerance=1e-8).update()
    assert torch.allclose(below.eigenvalues, reference(loss.theta())[0][K : 2 * K], rtol=1e-8)
    batch = BatchSubspace(loss, K, tolerance=1e-8)
    batch.samples = torch.arange(0, SAMPLES, 2)
    values = reference(loss.theta(), batch.samples)[0][:K]
    assert torch.allclose(batch.update().eigenvalues, values, rtol=1e-8)
    again = BatchSubspace(loss, K, tolerance=1e-8)
    again.load_state_dict(batch.state_dict())
    assert torch.equal(again.subspace.basis, batch.subspace.basis)
    adam = torch.optim.Adam(loss.parameters(), lr=0.01)
    set_gradient(loss, loss.value_and_gradient()[1])
    adam.step()
    assert OptimizerMetricSource(loss, K, adam, exact=True).update().k == K
    control: SubspaceSource = FixedSubspace(random_subspace(P, K, 0, dtype=torch.float64))
    assert control.update(loss.theta()).k == K
    assert batch_sharpness(loss, 8, 20).value > 0


def test_a_training_loop_can_be_watched(loss: Loss) -> None:
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.02)
    watcher = Watcher(loss, SubspaceTracker(loss, K), optimizer, every=1, quiet=True)
    for _ in range(3):
        set_gradient(loss, loss.value_and_gradient()[1])
        optimizer.step()
    watcher.close()
    assert [row["step"] for row in watcher.history][:2] == [0, 1]
    assert watcher.history[0]["loss"] == pytest.approx(float(mean_loss(Bare().theta())))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (GaussNewton, "GaussNewton needs the outputs of a model"),
        (ResidualHessian, "GaussNewton needs the outputs of a model"),
        (GradientCovariance, "GradientCovariance needs the losses of single samples"),
        (lambda loss: GradientSubspace(loss, K), "GradientSubspace needs"),
    ],
)
def test_what_looks_inside_of_a_loss_says_that_it_needs_an_objective(
    build: Callable[[Any], object], message: str, loss: Loss
) -> None:
    with pytest.raises(InvalidInput, match=f"loss: got '{type(loss).__name__}'.*{message}"):
        build(loss)
