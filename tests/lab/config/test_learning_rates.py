from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from thalweg.lab.config.learning_rates import (
    Constant,
    Cosine,
    Linear,
    ScheduleSettings,
    Step,
    factor_with_warmup,
)

TOTAL = 20


@pytest.mark.parametrize(
    ("schedule", "make"),
    [
        (Constant(), lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1.0)),
        (Linear(final=0.2), lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.2, TOTAL)),
        (Cosine(final=0.1), lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, TOTAL, 0.1)),
        (Step(every=6, gamma=0.5), lambda o: torch.optim.lr_scheduler.StepLR(o, 6, 0.5)),
    ],
)
def test_a_schedule_is_torchs_own(schedule: ScheduleSettings, make: Any):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    reference = make(optimizer)
    for step in range(TOTAL + 1):
        assert schedule.factor(step, TOTAL) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()


@pytest.mark.parametrize("schedule", [Linear(final=0.2), Cosine(final=0.2)])
def test_a_schedule_stays_at_its_end(schedule: ScheduleSettings):
    assert schedule.factor(TOTAL + 7, TOTAL) == pytest.approx(0.2)
    assert schedule.factor(0, TOTAL) == 1.0


def test_the_warm_up_is_a_line_and_the_schedule_has_the_steps_that_are_left():
    factors = [factor_with_warmup(Cosine(), 4, step, TOTAL) for step in range(TOTAL)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[12] == pytest.approx(0.5)
    assert factors[-1] == pytest.approx(0.5 * (1 + math.cos(math.pi * 15 / 16)))
