from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests import dense
from tests.networks import silu
from thalweg import registry
from thalweg.loss.objective import Objective
from thalweg.measure.curvature_shares import MULTIPLES_OF_EDGE, PARTS_OF_SHARPNESS
from thalweg.measure.step_state import StepState
from thalweg.optim.split import SplitUpdate
from thalweg.spectrum.subspace import Subspace
from thalweg.tracking.preconditioner import preconditioner
from thalweg.tracking.source import FixedSubspace, TrackerReport
from thalweg.tracking.threshold_source import ThresholdSource


def step(adaptive: bool) -> tuple[StepState, Tensor]:
    """A step on the full batch, and the dense Hessian before it."""
    case = silu().to(torch.float64)
    objective = Objective(case.model, case.loss, case.data)
    kind = torch.optim.Adam if adaptive else torch.optim.SGD
    optimizer = kind(case.model.parameters(), lr=0.5)
    theta = objective.theta()
    hessian = dense.hessian(dense.flat_loss(case), theta)
    case.loss(case.model(case.data[0]), case.data[1]).backward()
    gradient = torch.cat([p.grad.flatten() for p in case.model.parameters()])
    optimizer.step()
    update = objective.theta() - theta
    source = FixedSubspace(Subspace(torch.eye(len(theta))[:, :1].double(), torch.ones(1).double()))
    state = StepState(
        0,
        theta,
        objective,
        source,
        learning_rate=0.5,
        minibatch_gradient=gradient + 0.1,
        proposed=update,
        update=update,
        optimizer=optimizer,
    )
    return state, hessian


def shares(matrix: Tensor, vector: Tensor, curvatures: list[float]) -> list[float]:
    values, vectors = torch.linalg.eigh(matrix)
    parts = (vectors.T @ vector).square() / vector.square().sum()
    return [float(parts @ torch.sigmoid((values - tau) / (0.1 * tau))) for tau in curvatures]


def measured(name: str, state: StepState) -> dict[str, object]:
    return dict(registry.probes[name].measure(state))


def test_shares_are_those_of_the_dense_hessian() -> None:
    state, hessian = step(adaptive=False)
    row = measured("curvature_shares", state)
    sharpness = float(torch.linalg.eigvalsh(hessian)[-1])
    curvatures = [part * sharpness for part in PARTS_OF_SHARPNESS]
    assert row["share_curvatures"] == pytest.approx(curvatures, rel=1e-3)
    vectors = {
        "gradient": state.gradient,
        "minibatch": state.minibatch_gradient,
        "update": state.proposed,
    }
    for name, vector in vectors.items():
        assert row[f"{name}_shares"] == pytest.approx(shares(hessian, vector, curvatures), abs=0.01)
    update = state.proposed
    assert row["update_curvature"] == pytest.approx(
        float(update @ hessian @ update / (update @ update))
    )
    assert row["share_error"] < 0.01


@pytest.mark.parametrize("adaptive", [False, True])
def test_shares_beyond_the_edge_are_in_the_optimizers_own_metric(adaptive: bool) -> None:
    state, hessian = step(adaptive)
    row = measured("edge_shares", state)
    edge, gradient, update = 2 / 0.5, state.gradient, state.proposed
    if adaptive:
        root = preconditioner(state.optimizer).sqrt()
        hessian, edge = hessian / root / root[:, None], 2 * 1.9 / 0.1 / 0.5
        gradient, update = gradient / root, root * update
    curvatures = [multiple * edge for multiple in MULTIPLES_OF_EDGE]
    expected = shares(hessian, gradient, curvatures)
    assert row["gradient_edge_shares"] == pytest.approx(expected, abs=0.01)
    expected = shares(hessian, update, curvatures)
    assert row["update_edge_shares"] == pytest.approx(expected, abs=0.01)
    along = float(update @ hessian @ update / (update @ update)) / edge
    assert row["update_edge_curvature"] == pytest.approx(along, rel=1e-6)


def test_nothing_is_measured_of_what_is_not_there() -> None:
    state, _ = step(adaptive=False)
    state.update = state.proposed = state.minibatch_gradient = None
    row = measured("curvature_shares", state)
    assert "update_shares" not in row
    assert len(row["gradient_shares"]) == len(PARTS_OF_SHARPNESS)
    assert measured("edge_shares", state) == {}


def test_an_optimizer_without_a_threshold_has_no_edge() -> None:
    state, _ = step(adaptive=False)
    state.optimizer = torch.optim.Rprop(state.objective.parameters())
    assert measured("edge_shares", state) == {}


def quadratic(following: float) -> StepState:
    """H = diag(9, 4, 1), g = -(3, 2, 1), S_1 known, and lambda_2 as its source has it."""
    inputs = torch.diag(torch.tensor([3.0, 2.0, 1.0]).double()) * math.sqrt(1.5)
    data = (inputs, torch.full((3, 1), math.sqrt(1.5)).double())
    model = torch.nn.Linear(3, 1, bias=False).double()
    loss = torch.nn.MSELoss()
    source = FixedSubspace(Subspace(torch.eye(3).double()[:, :1], torch.tensor([9.0]).double()))
    source.report = TrackerReport(0.0, 0.0, True, 1, 0, next_eigenvalue=following)
    return StepState(0, torch.zeros(3).double(), Objective(model, loss, data), source, 0.1)


def test_the_share_at_the_gap_is_chi_squared() -> None:
    state = quadratic(4.0)
    row = measured("share_at_gap", state)
    assert row["gap_ratio"] == pytest.approx(4 / 9)
    hessian = torch.diag(torch.tensor([9.0, 4.0, 1.0])).double()
    assert row["gradient_share_at_gap"] == pytest.approx(
        shares(hessian, state.gradient, [6.0])[0], abs=0.01
    )
    assert row["gradient_share_at_gap"] == pytest.approx(9 / 14, abs=0.03)
    assert row["share_at_gap_error"] < 0.01


@pytest.mark.parametrize("following", [6.0, 9.0, -1.0, math.nan])
def test_without_a_clear_gap_there_is_no_share_at_it(following: float) -> None:
    row = measured("share_at_gap", quadratic(following))
    assert "gradient_share_at_gap" not in row
    assert row == ({} if math.isnan(following) else {"gap_ratio": pytest.approx(following / 9)})


def test_the_threshold_of_a_split_is_a_part_of_the_largest_curvature_seen() -> None:
    state, _ = step(adaptive=False)
    assert measured("split_threshold", state) == {}
    source = ThresholdSource(state.objective, 0.2, relative=True)
    source.update(state.theta, state.gradient)
    state.optimizer = SplitUpdate(state.optimizer, source, dominant=0.0, bulk=1.0)
    row = measured("split_threshold", state)
    assert row["split_threshold_part"] == pytest.approx(0.2, rel=1e-6)
    assert row["split_threshold"] == pytest.approx(0.2 * float(source.subspace.eigenvalues[0]))
