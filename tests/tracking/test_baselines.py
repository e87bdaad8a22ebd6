from __future__ import annotations

import pytest
import torch

from tests.networks import mlp
from thalweg.errors import InvalidInput
from thalweg.loss.objective import Objective
from thalweg.operators.hessian import Hessian
from thalweg.tracking.baselines import NextEigenspace


def objective() -> Objective:
    case = mlp().to(torch.float64)
    return Objective(case.model, case.loss, case.data, vectorize_up_to=0)


def test_the_next_eigenspace_is_spanned_by_the_eigenvectors_below_the_dominant_ones() -> None:
    loss = objective()
    matrix = Hessian(loss) @ torch.eye(loss.num_parameters, dtype=torch.float64)
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    control = NextEigenspace(loss, 2, tolerance=1e-9)
    found = control.update()
    assert torch.allclose(found.eigenvalues, values.flip(0)[2:4], rtol=1e-7)
    expected = vectors.flip(1)[:, 2:4]
    assert float((expected.T @ found.basis).square().sum()) > 2 - 1e-10
    assert control.report.subspace_cost > 0


def test_it_splits_as_its_subspace_does_and_can_be_restored() -> None:
    control = NextEigenspace(objective(), 2)
    control.update()
    vector = torch.arange(float(control.objective.num_parameters), dtype=torch.float64)
    split = control.split(vector)
    assert torch.equal(split.dominant, control.subspace.project(vector))
    other = NextEigenspace(objective(), 2)
    other.load_state_dict(control.state_dict())
    assert torch.equal(other.subspace.basis, control.subspace.basis)


def test_it_is_solved_at_every_nth_update_also_after_a_restart() -> None:
    control = NextEigenspace(objective(), 2, every=3)
    costs = []
    for number in range(7):
        if number == 5:
            other = NextEigenspace(objective(), 2, every=3)
            other.load_state_dict(control.state_dict())
            control = other
        control.update()
        costs.append(control.report.subspace_cost > 0)
    assert costs == [True, False, False, True, False, False, True]


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(InvalidInput, match="every: got 0"):
        NextEigenspace(objective(), 2, every=0)
    with pytest.raises(InvalidInput, match="at most P / 2"):
        NextEigenspace(objective(), 60)
    with pytest.raises(InvalidInput, match="k: got 0"):
        NextEigenspace(objective(), 0)
    with pytest.raises(InvalidInput, match=r"call update\(\) first"):
        _ = NextEigenspace(objective(), 2).subspace
