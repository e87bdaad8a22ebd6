from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from torch import nn

from tests import dense
from tests.networks import Case, silu
from thalweg import registry
from thalweg.errors import Diverged, InvalidInput
from thalweg.loss.objective import Objective
from thalweg.measure.gradient_noise_scale import gradient_noise_scale
from thalweg.measure.step_state import BATCHES, StepState
from thalweg.spectrum.subspace import Subspace
from thalweg.tracking.source import FixedSubspace


@pytest.fixture
def case() -> Case:
    return silu().to(torch.float64)


@pytest.fixture
def objective(case: Case) -> Objective:
    return Objective(case.model, case.loss, case.data)


def truth(case: Case) -> tuple[float, float]:
    """trace(Sigma) and norm(g)^2, from the gradient of each sample."""
    theta = dense.flat_parameters(case)
    each = torch.stack(
        [dense.gradient(dense.flat_loss(case, rows=[n]), theta) for n in range(len(case.data[0]))]
    )
    mean = each.mean(0)
    return float((each - mean).square().sum(1).mean()), float(mean.square().sum())


def test_batches_of_all_samples_but_one_give_it_exactly() -> None:
    # All C(N, N - 1) batches are alike on three samples in a triangle.
    height = 0.75**0.5
    points = [[1.0, 0.0], [-0.5, height], [-0.5, -height]]
    corners = torch.tensor(points, dtype=torch.float64)
    model = nn.Linear(2, 1, bias=False).double()
    nn.init.zeros_(model.weight)

    def along(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        # Gradients are the corners, moved by (2, 0), whatever theta is.
        return output.mean() + 2 * model.weight[0, 0]

    objective = Objective(model, along, (corners, torch.zeros(3, 1).double()))
    for size in (1, 2):
        found = gradient_noise_scale(objective, size, batches=3)
        assert found.value == pytest.approx(1 / 4, rel=1e-12)
        assert found.trace == pytest.approx(1.0, rel=1e-12)
        assert found.squared_norm == pytest.approx(4.0, rel=1e-12)
        assert found.standard_error == pytest.approx(0.0, abs=1e-12)
        assert found.cost == 1 + size


@pytest.mark.parametrize("size", [1, 4, 12])
def test_it_is_unbiased_at_every_batch_size(size: int, case: Case, objective: Objective) -> None:
    trace, squared = truth(case)
    found = gradient_noise_scale(objective, size, batches=400)
    assert found.squared_norm == pytest.approx(squared, rel=1e-9)
    assert abs(found.value - trace / squared) < 4 * found.standard_error
    assert found.standard_error < 0.1 * found.value


def test_the_mean_over_all_batches_is_exact(case: Case, objective: Objective) -> None:
    """All pairs of 13 samples, as the probe's shared batches, 8 at a time."""
    trace, squared = truth(case)
    pairs = [torch.tensor(pair) for pair in combinations(range(13), 2)][:78]
    source = FixedSubspace(Subspace(torch.eye(74).double()[:, :1], torch.ones(1).double()))
    total = 0.0
    for begin in range(0, 72, BATCHES):
        state = StepState(
            0,
            objective.theta(),
            objective,
            source,
            0.1,
            batches=lambda number, begin=begin: pairs[begin : begin + number],
        )
        total += registry.probes["gradient_noise_scale"].measure(state)["gradient_noise_scale"]
    rest = [objective.value_and_gradient(samples=pair)[1] for pair in pairs[72:]]
    gradient = objective.gradient()
    factor = 2 * 12 / 11 / squared
    missing = sum(float((one - gradient).square().sum()) * factor for one in rest)
    assert (total * BATCHES + missing) / 78 == pytest.approx(trace / squared, rel=1e-9)


def test_where_batches_are_not_known_the_probe_draws_its_own(
    case: Case, objective: Objective
) -> None:
    source = FixedSubspace(Subspace(torch.eye(74).double()[:, :1], torch.ones(1).double()))
    measure = registry.probes["gradient_noise_scale"].measure
    rows = [
        measure(StepState(step, objective.theta(), objective, source, 0.1)) for step in (5, 5, 6)
    ]
    assert rows[0] == rows[1] != rows[2]
    trace, squared = truth(case)
    found = rows[0]["gradient_noise_scale"], rows[0]["gradient_noise_scale_error"]
    assert abs(found[0] - trace / squared) < 4 * found[1]


def test_a_single_batch_has_no_error_and_no_gradient_no_scale(objective: Objective) -> None:
    assert math.isnan(gradient_noise_scale(objective, 4, batches=1).standard_error)
    zero = torch.zeros(74).double()
    assert math.isnan(gradient_noise_scale(objective, 4, batches=2, gradient=zero).value)


def test_bad_input_is_refused(objective: Objective) -> None:
    for size in (0, 13):
        with pytest.raises(InvalidInput, match=r"batch_size: got .* from 1 to N - 1 = 12"):
            gradient_noise_scale(objective, size)
    with pytest.raises(InvalidInput, match="batches: got 0"):
        gradient_noise_scale(objective, 4, batches=0)
    with pytest.raises(Diverged):
        gradient_noise_scale(objective, 4, theta=torch.full_like(objective.theta(), math.nan))
