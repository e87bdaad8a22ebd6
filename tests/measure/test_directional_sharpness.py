from __future__ import annotations

import math

import pytest
import torch

from tests import dense
from tests.networks import silu
from thalweg import registry
from thalweg.errors import InvalidInput
from thalweg.loss.objective import Objective
from thalweg.measure.directional_sharpness import directional_sharpness
from thalweg.measure.step_state import StepState
from thalweg.spectrum.subspace import Subspace
from thalweg.tracking.source import FixedSubspace


def test_it_is_the_curvature_along_a_vector_of_any_length() -> None:
    case = silu().to(torch.float64)
    objective = Objective(case.model, case.loss, case.data)
    theta = dense.flat_parameters(case)
    for rows in (slice(None), [1, 4, 7]):
        loss = dense.flat_loss(case, rows=rows)
        hessian, gradient = dense.hessian(loss, theta), dense.gradient(loss, theta)
        expected = float(gradient @ hessian @ gradient / (gradient @ gradient))
        samples = None if isinstance(rows, slice) else torch.tensor(rows)
        for length in (1.0, -1e-3, 1e6):
            found = directional_sharpness(objective, length * gradient, samples=samples)
            assert found == pytest.approx(expected, rel=1e-9)


def test_the_probe_is_along_gradient_and_update() -> None:
    case = silu().to(torch.float64)
    objective = Objective(case.model, case.loss, case.data)
    source = FixedSubspace(Subspace(torch.eye(74).double()[:, :1], torch.ones(1).double()))
    state = StepState(0, objective.theta(), objective, source, 0.1)
    measure = registry.probes["directional_sharpness"].measure
    assert set(measure(state)) == {"directional_sharpness_gradient"}
    state.update = torch.randn(74, generator=torch.Generator().manual_seed(0)).double()
    row = measure(state)
    for name, vector in (("gradient", objective.gradient()), ("update", state.update)):
        expected = directional_sharpness(objective, vector)
        assert row[f"directional_sharpness_{name}"] == pytest.approx(expected, rel=1e-9)
    state.update = torch.zeros(74).double()
    assert math.isnan(measure(state)["directional_sharpness_update"])


def test_a_vector_without_a_direction_is_refused() -> None:
    case = silu()
    objective = Objective(case.model, case.loss, case.data)
    with pytest.raises(InvalidInput, match="direction"):
        directional_sharpness(objective, torch.zeros(74))
