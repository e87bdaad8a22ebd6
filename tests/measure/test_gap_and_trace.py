from __future__ import annotations

import pytest
import torch

from tests import dense
from tests.networks import silu
from thalweg import registry, watch
from thalweg.loss.objective import Objective
from thalweg.measure.gap_and_trace import PRODUCTS
from thalweg.measure.step_state import StepState
from thalweg.spectrum.subspace import Subspace
from thalweg.tracking.source import FixedSubspace
from thalweg.tracking.tracker import SubspaceTracker


def test_the_gap_is_that_of_the_dense_hessian_from_above() -> None:
    case = silu().to(torch.float64)
    objective = Objective(case.model, case.loss, case.data)
    theta = objective.theta()
    values = torch.linalg.eigvalsh(dense.hessian(dense.flat_loss(case), theta)).flip(0)
    for k in (1, 2, 3):
        state = StepState(0, theta, objective, SubspaceTracker(objective, k, exact=True), 0.1)
        row = registry.probes["spectral_gap"].measure(state)
        expected = float(1 - values[k] / values[k - 1])
        gap, error = row["spectral_gap"], row["spectral_gap_error"]
        assert isinstance(gap, float)
        assert isinstance(error, float)
        # The error is an estimate.
        assert gap >= expected - 2 * error - 1e-9
        assert gap == pytest.approx(expected, abs=0.05)


def test_no_gap_is_known_of_a_source_that_does_not_look_below() -> None:
    case = silu()
    objective = Objective(case.model, case.loss, case.data)
    source = FixedSubspace(Subspace(torch.eye(74)[:, :1], torch.ones(1)))
    state = StepState(0, objective.theta(), objective, source, 0.1)
    assert registry.probes["spectral_gap"].measure(state) == {}


def test_the_trace_is_within_its_error_of_the_dense_one_and_says_its_cost() -> None:
    case = silu().to(torch.float64)
    objective = Objective(case.model, case.loss, case.data)
    theta = objective.theta()
    expected = float(dense.hessian(dense.flat_loss(case), theta).trace())
    source = FixedSubspace(Subspace(torch.eye(74).double()[:, :1], torch.ones(1).double()))
    deviations = []
    for step in range(20):
        state = StepState(step, theta, objective, source, 0.1)
        begin = objective.cost.gradients
        row = registry.probes["trace"].measure(state)
        value, error = row["trace"], row["trace_error"]
        assert isinstance(value, float)
        assert isinstance(error, float)
        deviations.append(abs(value - expected) / error)
        assert row["trace_products"] == PRODUCTS
        spent = (objective.cost.gradients - begin) / objective.num_samples
        # The first is with the check of products.
        assert step == 0 or spent == pytest.approx(1 + 1.25 * PRODUCTS)
    assert max(deviations) < 4
    assert sum(deviation < 1 for deviation in deviations) > 8


def test_both_are_columns_of_a_watched_training() -> None:
    case = silu()
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1)
    asked = ["spectral_gap", "trace"]
    with watch(
        case.model, case.loss, case.data, optimizer, k=2, every=1, quiet=True, probes=asked
    ) as watcher:
        optimizer.step()
    row = watcher.history[0]
    assert 0 < row["spectral_gap"] < 1
    assert row["trace"] > row["trace_error"] > 0
