"""How many workers train side by side, and when are they averaged?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field, model_validator

from thalweg.settings import Count, SpecModel, bad_value

if TYPE_CHECKING:
    from typing import Self

    from thalweg.contrib.averaging_period import AveragingPeriod

Positive = Annotated[float, Field(gt=0)]


class LocalSpec(SpecModel):
    """Workers, each with mini-batches of its own, averaged after rounds of local steps.

    A round is of `period` steps, or of max(minimum, floor((alpha / lr)^power)), with the learning
    rate of its first step; the last one ends with the phase.
    """

    workers: Count = Field(description="number of workers K; a step takes K mini-batches")
    period: Count | None = Field(default=None, description="local steps between two averages")
    alpha: Positive | None = Field(
        default=None, description="of the quadratic synchronization rule, instead of a period"
    )
    minimum: Count = Field(default=1, description="fewest steps of a round by that rule")
    power: Positive = Field(default=2.0, description="exponent of that rule")

    @model_validator(mode="after")
    def _says_when(self) -> Self:
        if (self.period is None) == (self.alpha is None):
            given = {"period": self.period, "alpha": self.alpha}
            raise bad_value("period", given, "either period or alpha")
        if self.period is not None and self.minimum != 1:
            raise bad_value("minimum", self.minimum, "with alpha only, a period is constant")
        return self

    def schedule(self, warmup_steps: int) -> AveragingPeriod:
        """The rule; throughout a warm-up its rounds are of the minimum."""
        from thalweg.contrib.averaging_period import ConstantPeriod, QuadraticRule

        if self.period is not None:
            return ConstantPeriod(self.period)
        assert self.alpha is not None
        return QuadraticRule(self.alpha, self.minimum, self.power, warmup_steps)
