from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.dense import flat_loss, flat_parameters, hessian
from tests.networks import Case, mlp
from thalweg.errors import InvalidInput
from thalweg.loss.objective import Objective
from thalweg.operators.hessian import PRODUCT_COST
from thalweg.spectrum.subspace import Subspace
from thalweg.tracking.batch_subspace import BatchSubspace

FIRST, SECOND = torch.arange(4), torch.tensor([7, 3, 5, 9, 1])


@pytest.fixture
def case() -> Case:
    return mlp().to(torch.float64)


def objective_of(case: Case) -> Objective:
    return Objective(case.model, case.loss, case.data, vectorize_up_to=0)


def dense(case: Case, rows: object, theta: Tensor, k: int) -> Subspace:
    """S_k of the Hessian over these rows, by double backward: shares no code with `Objective`."""
    matrix = hessian(flat_loss(case, rows=rows), theta)
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return Subspace(vectors.flip(1)[:, :k], values.flip(0)[:k])


def test_each_update_is_of_the_hessian_of_its_own_samples(case: Case) -> None:
    source = BatchSubspace(objective_of(case), 3, tolerance=1e-9)
    start = flat_parameters(case)
    for number, rows in enumerate((FIRST, SECOND, None, FIRST)):
        source.samples = rows
        theta = start + 0.05 * number
        found = source.update(theta)
        expected = dense(case, slice(None) if rows is None else rows, theta, 3)
        assert torch.allclose(found.eigenvalues, expected.eigenvalues, rtol=1e-7)
        assert found.overlap(expected) > 1 - 1e-10
        vector = theta.sin()
        split = source.split(vector)
        assert torch.allclose(split.dominant, expected.project(vector), atol=1e-7)
        assert torch.allclose(split.dominant + split.bulk, vector)


def test_two_batches_have_two_subspaces(case: Case) -> None:
    theta = flat_parameters(case)
    first, second = (dense(case, rows, theta, 3) for rows in (FIRST, SECOND))
    assert first.overlap(second) < 0.9


def test_without_a_theta_it_is_at_the_models_parameters(case: Case) -> None:
    source = BatchSubspace(objective_of(case), 2, tolerance=1e-9)
    source.samples = SECOND
    expected = dense(case, SECOND, flat_parameters(case), 2)
    assert source.update().overlap(expected) > 1 - 1e-10


def test_a_product_costs_its_share_of_the_samples(case: Case) -> None:
    source = BatchSubspace(objective_of(case), 3)
    total = source.objective.num_samples
    for rows, used in ((None, total), (FIRST, 4)):
        source.samples = rows
        source.update()
        report = source.report
        assert (report.subset, report.renewed, report.age) == (used, True, 0)
        products = report.subspace_cost / PRODUCT_COST * total / used
        # At least one for each eigenpair, and no more than theta has directions.
        assert 3 <= products <= source.objective.num_parameters


def test_it_is_solved_at_every_nth_update_also_after_a_restart(case: Case) -> None:
    steps = [torch.arange(n, n + 4) for n in range(7)]

    def bases(restart_at: int | None) -> list[Tensor]:
        source, found = BatchSubspace(objective_of(case), 2, every=3), []
        for number, rows in enumerate(steps):
            if number == restart_at:
                state = source.state_dict()
                source = BatchSubspace(objective_of(case), 2, every=3)
                source.load_state_dict(state)
            source.samples = rows
            found.append(source.update().basis)
            assert (source.report.subspace_cost > 0) == (number % 3 == 0)
        return found

    undisturbed = bases(None)
    for restart_at in (0, 3, 5):
        again = bases(restart_at)
        assert all(map(torch.equal, again, undisturbed))
    assert torch.equal(undisturbed[1], undisturbed[0])
    assert not torch.equal(undisturbed[3], undisturbed[2])


def test_what_cannot_be_is_refused(case: Case) -> None:
    objective = objective_of(case)
    with pytest.raises(InvalidInput, match="every: got 0"):
        BatchSubspace(objective, 2, every=0)
    for k in (0, objective.num_parameters + 1):
        with pytest.raises(InvalidInput, match=f"k: got {k}"):
            BatchSubspace(objective, k)
    source = BatchSubspace(objective, 2)
    with pytest.raises(InvalidInput, match=r"call update\(\) first"):
        _ = source.subspace
    source.samples = torch.tensor([objective.num_samples])
    with pytest.raises(InvalidInput, match="samples: got"):
        source.update()
