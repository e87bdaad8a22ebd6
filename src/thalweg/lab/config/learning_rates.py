"""How does the learning rate change over a phase?

A schedule is a factor on the optimizer's learning rate at each step of the phase, with a linear
warm-up before it where the phase asks for one.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar

from pydantic import Field

from thalweg.registry import schedules
from thalweg.settings import Settings

Share = Annotated[float, Field(ge=0, le=1)]


class ScheduleSettings(Settings):
    """The settings of one learning-rate schedule."""

    builder: ClassVar[str] = "factor"

    def factor(self, step: int, total: int) -> float:
        """Factor on the learning rate at `step` (from 0) of a phase of at most `total` steps."""
        raise NotImplementedError(f"{type(self).__name__} has no method factor")


@schedules.register("constant")
class Constant(ScheduleSettings):
    """The same learning rate throughout."""

    def factor(self, step: int, total: int) -> float:
        return 1.0


@schedules.register("linear")
class Linear(ScheduleSettings):
    """A straight line from 1 to `final`, reached at the step after the last."""

    final: Share = Field(default=0.0, description="factor at the end of the phase")

    def factor(self, step: int, total: int) -> float:
        return 1.0 + (self.final - 1.0) * min(step / max(total, 1), 1.0)


@schedules.register("cosine")
class Cosine(ScheduleSettings):
    """Half a cosine from 1 to `final` at the step after the last (Loshchilov, Hutter 2017)."""

    final: Share = Field(default=0.0, description="factor at the end of the phase")

    def factor(self, step: int, total: int) -> float:
        done = min(step / max(total, 1), 1.0)
        return self.final + (1.0 - self.final) * 0.5 * (1.0 + math.cos(math.pi * done))


@schedules.register("step")
class Step(ScheduleSettings):
    """Times `gamma` after every `every` steps, as in `torch.optim.lr_scheduler.StepLR`."""

    every: Annotated[int, Field(ge=1)] = Field(description="steps between two drops")
    gamma: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.1, description="factor at each drop"
    )

    def factor(self, step: int, total: int) -> float:
        return self.gamma ** (step // self.every)


def factor_with_warmup(
    schedule: ScheduleSettings, warmup_steps: int, step: int, total: int
) -> float:
    """Factor on the learning rate: up a line over `warmup_steps`, then the schedule.

    Step t < w of the warm-up has (t + 1) / w; the schedule runs over the `total` - w steps left.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return schedule.factor(step - warmup_steps, total - warmup_steps)
