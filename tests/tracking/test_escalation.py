from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.networks import digits
from thalweg.loss.objective import Objective
from thalweg.operators.hessian import Hessian
from thalweg.spectrum.eigensolver import top_eigenpairs
from thalweg.tracking.escalation import (
    FAILURES,
    FOLLOW,
    MOST_PATIENCE,
    PATIENCE,
    RENEW,
    SOLVE,
    Escalation,
)
from thalweg.tracking.tracker import SubspaceTracker

K = 10


def test_what_helped_begins_after_failures_in_a_row() -> None:
    escalation = Escalation()
    for _ in range(FAILURES - 1):
        escalation.note(SOLVE)
        assert escalation.begins == FOLLOW
    escalation.note(FOLLOW)
    for _ in range(FAILURES - 1):
        escalation.note(SOLVE)
        assert escalation.begins == FOLLOW
    escalation.note(SOLVE)
    assert (escalation.begins, escalation.left) == (SOLVE, PATIENCE)


def test_a_reference_that_has_served_is_no_failure() -> None:
    escalation = Escalation()
    for _ in range(10):
        escalation.note(RENEW, at_once=False)
    assert escalation.begins == FOLLOW


def test_after_its_time_the_cheaper_one_is_tried_and_one_failure_doubles_the_time() -> None:
    escalation, times = Escalation(), []
    for _ in range(FAILURES):
        escalation.note(SOLVE)
    for _ in range(5):
        spent = 0
        while escalation.begins == SOLVE:
            escalation.note(SOLVE)
            spent += 1
        times.append(spent)
        escalation.note(SOLVE)
    assert times == [PATIENCE, 2 * PATIENCE, 4 * PATIENCE, MOST_PATIENCE, MOST_PATIENCE]


def test_a_success_makes_it_as_patient_as_at_first() -> None:
    escalation = Escalation(failures=FAILURES - 1, patience=MOST_PATIENCE)
    escalation.note(FOLLOW)
    assert escalation == Escalation()


def test_a_restored_one_decides_alike() -> None:
    escalation = Escalation()
    for _ in range(FAILURES):
        escalation.note(RENEW)
    other = Escalation(**escalation.state_dict())
    assert other == escalation


@pytest.fixture(scope="module")
def objective() -> Objective:
    case = digits(warm_up=100)
    return Objective(case.model, case.loss, (case.data[0][:300], case.data[1][:300]))


def far_apart(objective: Objective, count: int) -> list[Tensor]:
    """Points between which the subspace turns too far to be followed."""
    generator = torch.Generator().manual_seed(0)
    theta = objective.theta()
    return [theta + 0.1 * torch.randn(theta.shape, generator=generator) for _ in range(count)]


def test_where_following_does_not_pay_updates_are_solves_and_cost_as_much(
    objective: Objective,
) -> None:
    tracker, costs = SubspaceTracker(objective, K), []
    for theta in far_apart(objective, 7):
        vector = objective.gradient(theta)
        subspace = tracker.update(theta, vector)
        costs.append(tracker.report.subspace_cost)
        solved = top_eigenpairs(Hessian(objective, theta), K, tolerance=1e-5)
        error = (subspace.project(vector) - solved.project(vector)).norm() / vector.norm()
        assert error < 0.01
    # The first one solves; the last ones do at once, without trying what failed.
    assert sum(costs[-4:]) / 4 < 1.5 * costs[0]


def test_where_the_subspace_stays_it_is_followed(objective: Objective) -> None:
    tracker = SubspaceTracker(objective, K)
    tracker.update()
    solve = tracker.report.subspace_cost
    for _ in range(6):
        tracker.update()
        assert tracker.report.subspace_cost < solve / 2
