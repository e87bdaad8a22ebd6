from __future__ import annotations

from typing import Any

import pytest
import scipy.linalg
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adadelta, Adam, AdamW, Optimizer, RMSprop

from tests import dense
from tests.networks import silu
from thalweg import registry
from thalweg.loss.objective import Objective
from thalweg.measure import step_state
from thalweg.measure.step_state import StepState
from thalweg.optim.sam import SAM
from thalweg.optim.split import SplitUpdate
from thalweg.optim.stability import sam_threshold, stability_threshold
from thalweg.spectrum.subspace import Subspace
from thalweg.tracking.preconditioner import preconditioner
from thalweg.tracking.source import FixedSubspace

LEARNING_RATE = 0.05
K = 3


def measure(name: str, at: StepState) -> dict[str, Any]:
    row = dict(registry.probes[name].measure(at))
    assert set(row) <= set(registry.probes[name].columns)
    return row


def valley(sharpness: float, theta: Tensor) -> tuple[nn.Linear, Objective, FixedSubspace]:
    """(sharpness x^2 + y^2) / 2 at theta = (x, y), and S_1."""
    inputs = torch.diag(torch.tensor([sharpness**0.5, 1.0], dtype=torch.float64))
    model = nn.Linear(2, 1, bias=False).double()
    model.weight.data = theta.clone().reshape(1, 2)

    def half_squares(output: Tensor, _: Tensor) -> Tensor:
        return output.square().mean()

    objective = Objective(model, half_squares, (inputs, torch.zeros(2, 1).double()))
    basis = torch.eye(2, dtype=torch.float64)[:, :1]
    return model, objective, FixedSubspace(Subspace(basis, torch.tensor([sharpness]).double()))


def at_valley(optimizer: Optimizer, objective: Objective, source: FixedSubspace) -> StepState:
    return StepState(0, objective.theta(), objective, source, LEARNING_RATE, optimizer=optimizer)


def test_the_ratio_of_gradient_descent_is_half_of_lr_times_sharpness() -> None:
    model, objective, source = valley(30.0, torch.ones(2).double())
    # The step's learning rate counts, whatever the optimizer was built with.
    row = measure("stability", at_valley(SGD(model.parameters(), lr=7.0), objective, source))
    assert row["stability_threshold"] == pytest.approx(2 / LEARNING_RATE)
    assert row["stability_ratio"] == pytest.approx(30 * LEARNING_RATE / 2)
    assert row["preconditioned_sharpness"] is None


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_at_the_threshold_sam_jumps_from_wall_to_wall(momentum: float) -> None:
    # On a parabola: there the gradient keeps its norm, and with it the perturbation.
    rho, gradient_norm = 0.1, 0.8
    effective = LEARNING_RATE / (1 + momentum)
    sharpness = sam_threshold(gradient_norm, effective, rho)
    x = gradient_norm / sharpness
    model, objective, source = valley(sharpness, torch.tensor([x, 0.0]).double())
    base = SGD(model.parameters(), lr=LEARNING_RATE, momentum=momentum)
    if momentum:
        # It came from the other wall.
        velocity = torch.tensor([[-2 * x / LEARNING_RATE, 0.0]], dtype=torch.float64)
        base.state[model.weight]["momentum_buffer"] = velocity
    optimizer = SAM(base, rho)
    row = measure("stability", at_valley(optimizer, objective, source))
    assert row["stability_threshold"] == pytest.approx(sharpness)
    assert row["stability_ratio"] == pytest.approx(1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(objective.samples.tensors[0]).square().mean()  # type: ignore[attr-defined]
        loss.backward()
        return loss

    closure()
    optimizer.step(closure)
    assert float(model.weight[0, 0].detach()) == pytest.approx(-x)


def test_sam_lowers_the_threshold_and_without_a_radius_leaves_it() -> None:
    model, objective, source = valley(30.0, torch.ones(2).double())
    base = SGD(model.parameters(), lr=LEARNING_RATE)
    rows = {
        rho: measure("stability", at_valley(SAM(base, rho), objective, source))
        for rho in (0.0, 0.05, 0.2)
    }
    thresholds = [row["stability_threshold"] for row in rows.values()]
    assert thresholds[0] == pytest.approx(2 / LEARNING_RATE)
    assert thresholds[0] > thresholds[1] > thresholds[2] > 0


def test_where_no_threshold_is_known_there_is_no_ratio() -> None:
    model, objective, source = valley(30.0, torch.ones(2).double())
    unknown = (
        Adadelta(model.parameters()),
        SAM(SGD(model.parameters(), lr=0.1), adaptive=True),
        SAM(Adam(model.parameters())),
    )
    for optimizer in unknown:
        row = measure("stability", at_valley(optimizer, objective, source))
        assert set(row.values()) == {None}
    at = StepState(0, objective.theta(), objective, source, LEARNING_RATE)
    assert measure("stability", at) == {}
    assert measure("alignment_own_metric", at) == {}


def test_a_decay_stronger_than_the_threshold_leaves_no_ratio() -> None:
    model, objective, source = valley(30.0, torch.ones(2).double())
    base = SGD(model.parameters(), lr=LEARNING_RATE, weight_decay=50.0)
    row = measure("stability", at_valley(base, objective, source))
    assert row["stability_threshold"] == pytest.approx(-10)
    assert row["stability_ratio"] is None
    row = measure("stability", at_valley(SAM(base, 0.1), objective, source))
    assert row["stability_threshold"] is None


def stepped(kind: type[Optimizer], **options: Any) -> tuple[StepState, Tensor, Tensor]:
    """The state after three steps, and H + w I and D of its step, dense."""
    case = silu().to(torch.float64)
    objective = Objective(case.model, case.loss, case.data, vectorize_up_to=0)
    optimizer = kind(case.model.parameters(), **{"lr": LEARNING_RATE} | options)  # type: ignore[call-arg]
    for _ in range(3):
        optimizer.zero_grad()
        case.loss(case.model(case.data[0]), case.data[1]).backward()
        theta = objective.theta()
        optimizer.step()
    update = objective.theta() - theta
    size = len(theta)
    hessian = dense.hessian(dense.flat_loss(case), theta)
    if kind is not AdamW:
        hessian += options.get("weight_decay", 0.0) * torch.eye(size)
    source = FixedSubspace(Subspace(torch.eye(size).double()[:, :K], torch.ones(K).double()))
    # Split or not: the optimizer inside counts.
    wrapped = SplitUpdate(optimizer, source)
    at = StepState(2, theta, objective, source, LEARNING_RATE, proposed=update, update=update)
    at.optimizer = wrapped
    return at, hessian, preconditioner(optimizer)


KINDS = pytest.mark.parametrize(
    ("kind", "options"),
    [(Adam, {"weight_decay": 0.3}), (AdamW, {"weight_decay": 0.3}), (RMSprop, {})],
)


@KINDS
def test_in_a_metric_the_ratio_is_that_of_the_preconditioned_sharpness(
    kind: type[Optimizer], options: dict[str, Any]
) -> None:
    at, hessian, diagonal = stepped(kind, **options)
    row = measure("stability", at)
    # Similar to D^-1/2 H D^-1/2, and not symmetric.
    expected = float(torch.linalg.eigvals(hessian / diagonal[:, None]).real.max())
    assert row["preconditioned_sharpness"] == pytest.approx(expected, rel=1e-4)
    factor = {Adam: 38, AdamW: 19 * (2 - 0.3 * LEARNING_RATE), RMSprop: 2}[kind]
    assert row["stability_threshold"] == pytest.approx(factor / LEARNING_RATE)
    assert row["stability_ratio"] == pytest.approx(expected * LEARNING_RATE / factor, rel=1e-4)


@KINDS
def test_the_alignments_are_those_of_the_generalized_eigenvectors(
    kind: type[Optimizer], options: dict[str, Any]
) -> None:
    at, hessian, diagonal = stepped(kind, **options)
    # H v = lambda D v with v^T D v = 1: then W = D^1/2 v.
    _, vectors = scipy.linalg.eigh(hessian.numpy(), torch.diag(diagonal).numpy())
    top = torch.from_numpy(vectors[:, -K:].copy())
    gradient, update = at.gradient, at.proposed
    assert update is not None
    whole = float((gradient @ (gradient / diagonal)).sqrt())
    row = measure("alignment_own_metric", at)
    expected = float((top.T @ gradient).norm()) / whole
    assert row["alignment_gradient_own_metric"] == pytest.approx(expected, abs=2e-3)
    expected = float((top.T @ (diagonal * update)).norm() / (update @ (diagonal * update)).sqrt())
    assert row["alignment_proposed_own_metric"] == pytest.approx(expected, abs=2e-3)


def test_both_probes_of_a_step_share_one_solve(monkeypatch: pytest.MonkeyPatch) -> None:
    at, _, _ = stepped(Adam)
    solve, solves = step_state.metric_subspace, []
    monkeypatch.setattr(step_state, "metric_subspace", lambda *a: solves.append(a[3]) or solve(*a))
    measure("stability", at)
    measure("alignment_own_metric", at)
    assert solves == [K]


def test_where_no_step_was_made_there_is_no_metric() -> None:
    at, _, _ = stepped(Adam)
    at.update = at.proposed = None
    row = measure("stability", at)
    assert row["stability_threshold"] == pytest.approx(38 / LEARNING_RATE)
    assert row["preconditioned_sharpness"] is row["stability_ratio"] is None
    assert measure("alignment_own_metric", at) == {}


@pytest.mark.parametrize("name", ["sgd", "adam", "rmsprop"])
def test_the_directional_curvature_is_along_the_gradient_in_the_optimizers_metric(
    name: str,
) -> None:
    case = silu().to(torch.float64)
    objective = Objective(case.model, case.loss, case.data)
    parameters = case.model.parameters()
    optimizer: torch.optim.Optimizer = {
        "sgd": lambda: torch.optim.SGD(parameters, lr=0.1),
        "adam": lambda: torch.optim.Adam(parameters, lr=0.01, weight_decay=0.3),
        "rmsprop": lambda: torch.optim.RMSprop(parameters, lr=0.01),
    }[name]()
    theta = objective.theta()
    case.loss(case.model(case.data[0]), case.data[1]).backward()
    optimizer.step()
    hessian = dense.hessian(dense.flat_loss(case), theta)
    gradient = objective.gradient(theta)
    diagonal = torch.ones_like(theta) if name == "sgd" else preconditioner(optimizer)
    decay = 0.3 if name == "adam" else 0.0
    direction = gradient / diagonal
    image = hessian @ direction + decay * direction
    expected = float(direction @ image / (gradient @ direction))
    source = FixedSubspace(Subspace(torch.eye(len(theta)).double()[:, :1], torch.ones(1).double()))
    state = StepState(0, theta, objective, source, 0.1 if name == "sgd" else 0.01)
    state.optimizer, state.update = optimizer, objective.theta() - theta
    row = registry.probes["directional_stability"].measure(state)
    assert row["directional_curvature_own_metric"] == pytest.approx(expected, rel=1e-9)
    threshold = stability_threshold(optimizer, objective.parameters()).value
    assert threshold is not None
    assert row["directional_margin"] == pytest.approx(1 - expected / threshold, rel=1e-9)
    state.update = None
    assert registry.probes["directional_stability"].measure(state) == {}
