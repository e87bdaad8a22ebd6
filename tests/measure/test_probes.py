from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from thalweg import registry
from thalweg.errors import InvalidInput
from thalweg.loss.objective import Objective
from thalweg.measure.probes import SHOWN_PARAMETERS, probe
from thalweg.measure.step_state import BranchPoint, StepState
from thalweg.operators.hessian import Hessian
from thalweg.spectrum.eigensolver import top_eigenpairs
from thalweg.spectrum.subspace import Subspace
from thalweg.tracking.tracker import SubspaceTracker

LEARNING_RATE = 0.05


def trajectory(
    optimizer: type[torch.optim.Optimizer] = torch.optim.SGD, **options: Any
) -> Iterator[StepState]:
    """Full-batch steps on least squares, whose Hessian is the same everywhere; float64."""
    torch.manual_seed(0)
    model = nn.Linear(6, 1).double()
    data = (torch.randn(60, 6).double() * torch.tensor([5, 3, 1, 1, 0.5, 0.2]), torch.randn(60, 1))
    data = (data[0].double(), data[1].double())
    objective = Objective(model, nn.MSELoss(), data, vectorize_up_to=0)
    source = SubspaceTracker(objective, 2, exact=True, tolerance=1e-10)
    stepper = optimizer(model.parameters(), lr=LEARNING_RATE, **options)
    start = BranchPoint(objective.theta(), source.update())
    for step in range(6):
        theta = objective.theta()
        stepper.zero_grad()
        loss = nn.functional.mse_loss(model(data[0]), data[1])
        loss.backward()
        gradient = torch.cat([p.grad.reshape(-1) for p in model.parameters()])  # type: ignore[union-attr]
        stepper.step()
        update = objective.theta() - theta
        yield StepState(
            step=step,
            theta=theta,
            objective=objective,
            source=source,
            learning_rate=LEARNING_RATE,
            minibatch_loss=float(loss.detach()),
            minibatch_gradient=gradient,
            proposed=update,
            update=update,
            branch_point=start,
            evaluate_test=lambda theta: (1.5, 0.25),
            solve=lambda theta, k, o=objective: top_eigenpairs(Hessian(o, theta), k),
        )


def measure(name: str, state: StepState) -> dict[str, Any]:
    row = dict(registry.probes[name].measure(state))
    assert set(row) <= set(registry.probes[name].columns)
    return row


def test_both_effective_learning_rates_of_sgd_are_the_learning_rate() -> None:
    for state in trajectory():
        row = measure("effective_learning_rates", state)
        for part in ("dominant", "bulk"):
            rate = row[f"lr_numerator_{part}"] / row[f"lr_denominator_{part}"]
            assert row[f"effective_lr_{part}"] == rate
            assert rate == pytest.approx(LEARNING_RATE, rel=1e-7)


def test_momentum_raises_the_effective_learning_rate_of_the_bulk() -> None:
    # lr / (1 - momentum) where the gradient hardly changes; less where it does.
    sums = dict.fromkeys(registry.probes["effective_learning_rates"].columns, 0.0)
    for state in trajectory(momentum=0.5):
        for name, value in measure("effective_learning_rates", state).items():
            sums[name] += value
    bulk = sums["lr_numerator_bulk"] / sums["lr_denominator_bulk"]
    dominant = sums["lr_numerator_dominant"] / sums["lr_denominator_dominant"]
    assert LEARNING_RATE < bulk < 2 * LEARNING_RATE
    assert bulk > 1.2 * dominant


def test_alignments_and_norms_are_those_of_the_dense_eigenvectors() -> None:
    for state in trajectory():
        matrix = Hessian(state.objective) @ torch.eye(7, dtype=torch.float64)
        top = torch.linalg.eigh(matrix)[1].flip(1)[:, :2]
        gradient = state.gradient
        dominant = float((top.T @ gradient).norm())
        chi = dominant / float(gradient.norm())
        for name in ("alignment_gradient", "alignment_minibatch"):
            assert measure(name, state)[name] == pytest.approx(chi, rel=1e-6)
        row = measure("alignment_update", state)
        assert row["alignment_proposed"] == pytest.approx(chi, rel=1e-6)
        norms = measure("norms", state)
        assert norms["gradient_norm_dominant"] == pytest.approx(dominant, rel=1e-6)
        made = LEARNING_RATE * norms["gradient_norm_bulk"]
        assert norms["update_norm_bulk"] == pytest.approx(made, rel=1e-6)


def test_sharpness_and_solved_eigenvalues_are_those_of_the_dense_hessian() -> None:
    state = next(trajectory())
    matrix = Hessian(state.objective) @ torch.eye(7, dtype=torch.float64)
    values = torch.linalg.eigvalsh(matrix).flip(0).tolist()
    row = measure("sharpness", state)
    assert row["sharpness"] == pytest.approx(values[0], rel=1e-6)
    assert row["lr_sharpness"] == pytest.approx(LEARNING_RATE * values[0], rel=1e-6)
    assert row["eigenvalues"] == pytest.approx(values[:2], rel=1e-6)
    row = measure("solved_eigenvalues", state)
    assert row["solved_eigenvalues"] == pytest.approx(values[:4], rel=1e-3, abs=1e-3 * values[0])
    assert len(row["solved_residuals"]) == 4


def test_solved_eigenvalues_ask_for_no_tracked_subspace_where_k_is_known() -> None:
    state = replace(next(trajectory()), k=2)
    assert len(measure("solved_eigenvalues", state)["solved_eigenvalues"]) == 4
    assert not state.subspace_is_known


def test_displacement_starts_at_zero_and_its_parts_sum_to_the_way_gone() -> None:
    states = list(trajectory())
    first = measure("displacement", states[0])
    assert first == {"displacement_dominant": 0.0, "displacement_bulk": 0.0}
    last = states[-1]
    assert last.branch_point is not None
    row = measure("displacement", last)
    gone = float((last.theta - last.branch_point.theta).norm())
    assert math.hypot(*row.values()) == pytest.approx(gone)
    assert min(row.values()) > 0


def test_the_overlap_with_the_branch_point_is_one_where_the_hessian_stays() -> None:
    assert measure("overlap", list(trajectory())[-1])["overlap_branch_point"] == pytest.approx(1)


def test_losses_are_those_of_the_step() -> None:
    state = next(trajectory())
    assert measure("loss", state)["loss"] == pytest.approx(state.minibatch_loss)
    assert measure("minibatch_loss", state) == {"minibatch_loss": state.minibatch_loss}
    assert measure("test", state) == {"test_loss": 1.5, "test_accuracy": 0.25}


def test_the_cost_is_averaged_over_the_steps_since_the_last_row() -> None:
    state = next(trajectory())
    state.steps_before, state.gradients_before = 3, 10.0
    _ = state.subspace
    row = measure("subspace_cost", state)
    assert row["subspace_gradients"] == pytest.approx((10 + state.source.report.subspace_cost) / 4)
    assert row["subspace_error"] == state.source.report.error


def test_the_position_of_few_parameters_is_written_down() -> None:
    state = next(trajectory())
    assert measure("position", state) == {"position": state.theta.tolist()}
    state.theta = torch.zeros(SHOWN_PARAMETERS)
    assert len(measure("position", state)["position"]) == SHOWN_PARAMETERS
    state.theta = torch.zeros(SHOWN_PARAMETERS + 1)
    assert measure("position", state) == {}


def test_what_a_moment_does_not_have_is_not_measured() -> None:
    state = next(trajectory())
    bare = StepState(0, state.theta, state.objective, state.source, 0.1)
    for name in ("test", "displacement", "overlap", "effective_learning_rates"):
        assert measure(name, bare) == {}
    assert measure("solved_eigenvalues", bare) == {}
    assert measure("alignment_minibatch", bare) == {"alignment_minibatch": None}
    assert set(measure("norms", bare)) == {"gradient_norm_dominant", "gradient_norm_bulk"}


def test_a_zero_vector_has_no_alignment() -> None:
    state = next(trajectory())
    state.update = torch.zeros_like(state.theta)
    assert math.isnan(measure("alignment_update", state)["alignment_update"])


def test_every_column_belongs_to_one_probe() -> None:
    columns = [column for entry in registry.probes.values() for column in entry.columns]
    assert len(columns) == len(set(columns))
    assert all(set(entry.vectors) <= set(entry.columns) for entry in registry.probes.values())


@pytest.fixture
def _restored() -> Iterator[None]:
    before = dict(registry.probes)
    yield
    registry.probes.clear()
    registry.probes.update(before)


@pytest.mark.usefixtures("_restored")
def test_a_probe_of_ones_own_is_a_function() -> None:
    @probe("theta_length", ["theta_length"])
    def theta_length(state: StepState) -> dict[str, float]:
        return {"theta_length": float(state.theta.norm())}

    state = next(trajectory())
    assert measure("theta_length", state)["theta_length"] == float(state.theta.norm())


@pytest.mark.usefixtures("_restored")
@pytest.mark.parametrize(
    ("name", "columns", "message"),
    [("loss", ["new"], "probe name: got 'loss'"), ("mine", ["loss", "new"], r"got \['loss'\]")],
)
def test_a_name_that_is_taken_is_refused(name: str, columns: list[str], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        probe(name, columns)(lambda state: {})


def test_the_subspace_a_probe_sees_is_the_sources() -> None:
    state = next(trajectory())
    assert isinstance(state.subspace, Subspace)
    vector: Tensor = torch.ones(7, dtype=torch.float64)
    assert torch.equal(state.parts(vector)[0], state.source.subspace.project(vector))
