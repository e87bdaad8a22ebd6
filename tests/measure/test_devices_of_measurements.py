"""What is measured along a trajectory, on the CPU and on a GPU."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.networks import CASES, Case
from tests.sampling import few
from thalweg import registry
from thalweg.loss.objective import Objective
from thalweg.measure.batch_sharpness import batch_sharpness
from thalweg.measure.preconditioned_sharpness import preconditioned_sharpness
from thalweg.measure.step_state import StepState
from thalweg.measure.watch import watch
from thalweg.operators.hessian import Hessian
from thalweg.spectrum import gap
from thalweg.spectrum.eigensolver import top_eigenpairs
from thalweg.tracking.source import FixedSubspace

CPU = torch.device("cpu")


def random_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return states if device == CPU else [*states, torch.cuda.get_rng_state(device)]


def train(device: torch.device, every: int | None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Adam with dropout on batches and noise drawn on the device; what it holds, and the rows."""
    torch.manual_seed(0)
    layers = nn.Linear(12, 8), nn.Tanh(), nn.Dropout(0.4), nn.Linear(8, 3)
    model, loss = nn.Sequential(*layers).to(device), nn.CrossEntropyLoss()
    inputs, target = torch.randn(40, 12).to(device), torch.randint(0, 3, (40,)).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    watcher = None
    if every is not None:
        watcher = watch(model, loss, (inputs, target), optimizer, every=every, quiet=True)
    for _ in range(6):
        chosen = torch.randint(0, 40, (8,), device=device)
        optimizer.zero_grad()
        noise = 0.1 * torch.randn(8, 12, device=device)
        loss(model(inputs[chosen] + noise), target[chosen]).backward()
        optimizer.step()
    held = {"model": model.state_dict(), "optimizer": optimizer.state_dict()["state"]}
    return {**held, "random": random_states(device)}, [] if watcher is None else watcher.history


def tensors(held: Any) -> list[Tensor]:
    if isinstance(held, Tensor):
        return [held]
    return [
        t for part in (held.values() if isinstance(held, dict) else held) for t in tensors(part)
    ]


@pytest.mark.slow
def test_watching_leaves_a_training_as_it_is(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The gap of this small problem is closed here and there: of no matter.
    monkeypatch.setattr(gap, "CLOSED", math.inf)
    alone, _ = train(device, None)
    watched, rows = train(device, 2)
    pairs = list(zip(tensors(alone), tensors(watched), strict=True))
    assert len(pairs) > 10
    assert all(torch.equal(one, other) for one, other in pairs)
    assert len(rows) == 3
    for row in rows:
        assert math.isfinite(row["sharpness"])
        assert math.isfinite(row["preconditioned_sharpness"])
        assert 0 <= row["alignment_gradient"] <= 1


def moment_of(case: Case) -> StepState:
    """A step of Adam from where the network is, with S_3 there."""
    objective = Objective(case.model, case.loss, case.data)
    space = top_eigenpairs(Hessian(objective, keep_graph=True), 3, tolerance=1e-9)
    optimizer = torch.optim.Adam(case.model.parameters(), lr=0.01)
    theta = objective.theta()
    case.loss(case.model(case.data[0]), case.data[1]).backward()
    optimizer.step()
    state = StepState(
        step=0,
        theta=theta,
        objective=objective,
        source=FixedSubspace(space),
        learning_rate=0.01,
        optimizer=optimizer,
        k=3,
        batches=lambda number: [(torch.arange(4) + n) % len(case.data[0]) for n in range(number)],
    )
    state.minibatch_loss, state.minibatch_gradient = float(state.loss), state.gradient
    state.update = state.proposed = objective.theta() - theta
    return state


@pytest.mark.parametrize("name", few(1, ["mlp", "attention"]))
def test_every_probe_measures_what_it_measures_on_the_cpu(name: str, device: torch.device) -> None:
    case = CASES[name]().to(torch.float64)
    here, there = moment_of(case.on(CPU)), moment_of(case.on(device))
    asked = 0
    for probe in registry.probes.values():
        # Two need what a run of the lab knows.
        if probe.name in ("test", "solved_eigenvalues"):
            continue
        expected, found = dict(probe.measure(here)), dict(probe.measure(there))
        assert expected.keys() == found.keys(), probe.name
        for column, value in expected.items():
            asked += value is not None
            # Random directions meet eigenvectors of either sign: the rest is rounding.
            assert found[column] == pytest.approx(value, rel=1e-4, abs=1e-9, nan_ok=True), column
    assert asked > 20


@pytest.mark.slow
def test_sharpnesses_of_batches_and_in_adams_metric_are_those_of_the_cpu(
    device: torch.device,
) -> None:
    case = CASES["silu"]().to(torch.float64)
    found = []
    for place in (CPU, device):
        state = moment_of(copy.deepcopy(case).on(place))
        assert state.optimizer is not None
        metric = preconditioned_sharpness(state.objective, state.optimizer, tolerance=1e-6)
        batches = batch_sharpness(state.objective, 4, batches=5)
        found.append((float(metric.eigenvalues[0]), batches.value, batches.standard_error))
    assert found[1] == pytest.approx(found[0], rel=1e-6)
