"""A run with workers: the samples that each sees, where theta_t is, and how it goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.lab.small_study import begin, differing, execute, left, small_spec
from tests.sampling import few
from thalweg.errors import Interrupted
from thalweg.lab.config import PhaseSpec
from thalweg.lab.training import Run, Setup
from thalweg.lab.training.building import make_optimizer
from thalweg.lab.training.step import make_update, minibatch, samples_of
from thalweg.loss.objective import Objective
from thalweg.measure.step_state import StepState
from thalweg.problems import Problem
from thalweg.spectrum.subspace import random_subspace
from thalweg.tracking.source import FixedSubspace

SEED, LR, STEPS = 7, 0.5, 7
INPUTS = torch.linspace(-1, 1, 120, dtype=torch.float64).reshape(40, 3).sin()
TARGETS = torch.linspace(1, 0, 80, dtype=torch.float64).reshape(40, 2).cos()


class Training:
    """A few steps of a phase, with the moments of its steps."""

    def __init__(self, **said: Any) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        loss = nn.MSELoss()
        objective = Objective(model, loss, (INPUTS, TARGETS), mode="eval")
        setup = Setup(Problem(model=model, loss=loss, train=(INPUTS, TARGETS)), objective, 2)
        sgd = {"name": "sgd", "lr": LR}
        phase = PhaseSpec.model_validate({"optimizer": sgd, "steps": STEPS, **said})
        space = random_subspace(objective.num_parameters, 2, 0, dtype=torch.float64)
        source = FixedSubspace(space)
        optimizer = make_optimizer(small_spec(), phase, setup, SEED, source)
        self.objective = objective
        self.moments: list[StepState] = []
        for step in range(STEPS):
            rate = phase.learning_rate(step, STEPS)
            moment = StepState(step, objective.theta(), objective, source, learning_rate=rate)
            make_update(moment, setup, optimizer, phase, SEED).move_on()
            self.moments.append(moment)
        self.thetas = [*(moment.theta for moment in self.moments), objective.theta()]


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-10, atol=1e-13)


def test_together_the_workers_see_the_batch_of_synchronous_training() -> None:
    local = {"workers": 3, "period": 2}
    one = PhaseSpec.model_validate(
        {"optimizer": {"name": "sgd", "lr": LR}, "batch_size": 6, "steps": 9, "local": local}
    )
    for step in range(9):  # 40 samples: batches go beyond an epoch
        parts = [samples_of(one, SEED, step, worker, 40) for worker in range(3)]
        assert torch.equal(torch.cat(parts), minibatch(SEED, step, 18, 40))


def test_averages_after_every_step_are_synchronous_training() -> None:
    local = Training(batch_size=6, local={"workers": 3, "period": 1})
    synchronous = Training(batch_size=18)
    for one, other in zip(local.thetas, synchronous.thetas, strict=True):
        assert close(one, other)
    for one, other in zip(local.moments, synchronous.moments, strict=True):
        assert one.minibatch_gradient is not None
        assert other.minibatch_gradient is not None
        assert close(one.minibatch_gradient, other.minibatch_gradient)
        assert one.minibatch_loss == pytest.approx(other.minibatch_loss)


def test_theta_is_the_mean_of_workers_that_descend_by_themselves() -> None:
    local = Training(batch_size=5, local={"workers": 2, "period": 3})
    objective = local.objective
    workers = [local.thetas[0]] * 2
    for step in range(STEPS):
        gradients = [
            objective.gradient(theta, minibatch(SEED, 2 * step + worker, 5, 40))
            for worker, theta in enumerate(workers)
        ]
        seen = local.moments[step].minibatch_gradient
        assert seen is not None
        assert close(seen, (gradients[0] + gradients[1]) / 2)
        workers = [w - LR * g for w, g in zip(workers, gradients, strict=True)]
        mean = (workers[0] + workers[1]) / 2
        if step in (2, 5, 6):  # the last round ends with the phase
            workers = [mean] * 2
        assert close(local.thetas[step + 1], mean)


def test_rounds_grow_as_the_schedule_lowers_the_learning_rate() -> None:
    # Linear from 0.5 over 7 steps; (0.5 / lr)^2 >= 2 from step 3 on: rounds at 0, 1, 2, 3, 5.
    said = {"batch_size": 5, "schedule": "linear"}
    rule = Training(**said, local={"workers": 2, "alpha": 0.5})
    rates = [moment.learning_rate for moment in rule.moments]
    lengths = [int((0.5 / rate) ** 2) for rate in rates]
    assert lengths[:3] == [1, 1, 1]
    assert lengths[3] == 3
    # Up to step 3 as averages after every step; no longer at step 5.
    every = Training(**said, local={"workers": 2, "period": 1})
    same = [close(a, b) for a, b in zip(rule.thetas, every.thetas, strict=True)]
    assert same == [True] * 5 + [False] * 3


CHANGES: dict[str, Any] = {
    "phases.0.steps": 8,
    "phases.0.optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
    "phases.0.local": {"workers": 3, "period": 4},
    "branches": {
        "rule": {"steps": 8, "local": {"workers": 2, "alpha": 0.15, "minimum": 2}},
        "sam": {
            "steps": 8,
            "optimizer": {"name": "sam", "lr": 0.05, "rho": 0.1, "momentum": 0.9},
        },
        "alone": {"steps": 8, "local": "off"},
    },
    "probes": {"loss": 2, "sharpness": 4},
    "checkpoint": {"every_steps": 3, "every_seconds": 0.0},
}


@pytest.mark.parametrize("branches", few(1, [["sam"], ["rule", "alone"]]), ids=str)
def test_a_stopped_run_goes_on_bit_for_bit(quick_path: Path, branches: list[str]) -> None:
    spec = small_spec(CHANGES)
    whole, stopped = (begin(quick_path / folder, spec) for folder in ("whole", "stopped"))
    for branch in ("trunk", *branches):
        execute(whole, spec, branch)
        calls = iter(range(100))
        run = Run(spec, stopped, 0, branch, should_stop=lambda: next(calls) == 6)  # noqa: B023
        with pytest.raises(Interrupted):
            run.execute()
        execute(stopped, spec, branch)
        assert differing(left(whole, branch), left(stopped, branch)) == []
