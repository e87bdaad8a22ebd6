from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.networks import digits
from thalweg.errors import InvalidInput
from thalweg.loss.objective import Objective
from thalweg.operators.hessian import Hessian
from thalweg.spectrum.eigensolver import top_eigenpairs
from thalweg.tracking import follow_or_solve
from thalweg.tracking.follow_or_solve import FollowOrSolve

K = 4


@pytest.fixture
def objective() -> Objective:
    case = digits(warm_up=100)
    return Objective(case.model, case.loss, (case.data[0][:300], case.data[1][:300]))


def far_apart(objective: Objective, count: int) -> list[Tensor]:
    """Points between which the subspace turns too far to be followed."""
    generator = torch.Generator().manual_seed(0)
    theta = objective.theta()
    return [theta + 0.1 * torch.randn(theta.shape, generator=generator) for _ in range(count)]


@pytest.fixture
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow_or_solve, "PATIENCE", 3)
    monkeypatch.setattr(follow_or_solve, "SOLVES", 2)


@pytest.mark.usefixtures("_short")
def test_it_solves_while_every_update_renews_and_tries_to_follow_again(
    objective: Objective,
) -> None:
    source = FollowOrSolve(objective, K)
    solving: list[bool] = []
    for theta in far_apart(objective, 8):
        vector = objective.gradient(theta)
        subspace = source.update(theta, vector)
        solving.append(source.solving)
        assert source.report.renewed
        if source.solving:
            solved = top_eigenpairs(Hessian(objective, theta), K, tolerance=1e-5)
            error = (subspace.project(vector) - solved.project(vector)).norm() / vector.norm()
            assert error < 5e-3
            assert source.subspace.overlap(subspace) == pytest.approx(1)
    assert solving == [False] * 4 + [True] * 2 + [False] * 2


@pytest.mark.usefixtures("_short")
def test_where_the_subspace_stays_it_is_followed(objective: Objective) -> None:
    source = FollowOrSolve(objective, K)
    solve = source.update() and source.report.subspace_cost
    for _ in range(6):
        source.update()
        assert not source.solving
        assert source.report.subspace_cost < solve / 2
    part = source.split(torch.ones(objective.num_parameters))
    assert float((part.dominant + part.bulk - 1).norm()) < 1e-3


@pytest.mark.usefixtures("_short")
def test_a_restored_one_goes_on_bit_for_bit(objective: Objective) -> None:
    source = FollowOrSolve(objective, K)
    for theta in far_apart(objective, 8):
        restored = FollowOrSolve(objective, K)
        restored.load_state_dict(source.state_dict())
        assert restored.report.subspace_cost == source.report.subspace_cost
        source.update(theta)
        restored.update(theta)
        assert torch.equal(restored.subspace.basis, source.subspace.basis)
        assert restored.report == source.report


def test_bad_settings_are_refused_at_once(objective: Objective) -> None:
    with pytest.raises(InvalidInput, match="k: got 0"):
        FollowOrSolve(objective, 0)
