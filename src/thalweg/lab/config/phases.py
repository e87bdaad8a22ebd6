"""What is a stretch of training: with which optimizer, batch size and split, and when does it end?

The trunk is one such phase after another from the start. A branch is one phase that begins at the
trunk's end and takes everything that it does not say itself from the trunk's last phase.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from thalweg.lab.config.learning_rates import ScheduleSettings, factor_with_warmup
from thalweg.lab.config.optimizers import OptimizerSettings
from thalweg.lab.store.durable import is_folder_name
from thalweg.registry import NAME_PATTERN, NAME_WORDS, optimizers, schedules
from thalweg.settings import Choice, Count, SpecModel, Wording, bad_value

if TYPE_CHECKING:
    from typing import Self

    from thalweg.contrib.averaging_period import AveragingPeriod

LONGEST_NAME = 64
Name = Annotated[
    str,
    Field(pattern=NAME_PATTERN, max_length=LONGEST_NAME),
    Wording(f"at most {LONGEST_NAME} of {NAME_WORDS}"),
]


def _as_folder(name: str) -> str:
    if not is_folder_name(name):
        raise ValueError("not the name of a folder")
    return name


FolderName = Annotated[
    str,
    Field(pattern=NAME_PATTERN, max_length=LONGEST_NAME),
    AfterValidator(_as_folder),
    Wording(
        f"at most {LONGEST_NAME} of letters, digits, '-', '_' and '.', a letter or digit first, no"
        " '.' last, and no name that Windows keeps for itself (con, nul, com1, ...)"
    ),
]
"""The name of a branch or study, which becomes that of a folder, on any system."""
NotNegativeCount = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
OptimizerChoice = Annotated[OptimizerSettings, Choice(optimizers)]
ScheduleChoice = Annotated[ScheduleSettings, Choice(schedules)]
BatchSize = Count | Literal["all"]
Alignment = Annotated[float, Field(gt=0, le=1)]
Averaging = Annotated[float, Field(ge=0, lt=1)]


class NoiseSpec(SpecModel):
    """What is added to the gradient of a step: noise of mini-batches, all of it or one part.

    Q (g_B - g), with g_B the gradient of a mini-batch, g that of the full loss.
    """

    part: Literal["all", "dominant", "bulk"] = Field(
        description="Q: the identity, the projection on S_k, or on the bulk"
    )
    scale: Annotated[float, Field(ge=0)] = Field(default=1.0, description="factor on it")
    batch_size: Count = Field(default=50, description="samples in the mini-batch B")


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


class SplitSourceSpec(SpecModel):
    """A dominant space without second derivatives, for the split alone; probes keep S_k."""

    name: Literal["updates", "gradients"] = Field(
        description="updates: principal directions of the last proposed updates; gradients: of the"
        " gradients of single samples",
    )
    k: Count = Field(default=4, description="directions, of each parameter tensor or of all")
    blocks: Literal["tensor", "all"] = Field(
        default="tensor", description="a space of each parameter tensor, or one of all parameters"
    )
    window: Annotated[int, Field(ge=2), Wording("an integer >= 2")] = Field(
        default=16, description="updates, or samples, whose principal directions are taken"
    )
    every: Count = Field(default=10, description="steps from one renewal of the space to the next")
    centered: bool = Field(
        default=True, description="subtract the mean first, so that the space is that of the noise"
    )

    @model_validator(mode="after")
    def _window_spans_the_space(self) -> Self:
        if self.k > self.window:
            raise bad_value("k", self.k, f"at most the window, {self.window}")
        return self


class SplitSpec(SpecModel):
    """How the dominant and the bulk part of each proposed update are scaled."""

    dominant: float = Field(default=1.0, description="factor on the part of the update in S_k")
    bulk: float = Field(default=1.0, description="factor on the rest of the update")
    dominant_end: float | None = Field(
        default=None,
        description="factor at the phase's last step, reached on a line; constant if not given",
    )
    bulk_end: float | None = Field(default=None, description="the same of the rest of the update")
    basis: Literal["live", "frozen"] = Field(
        default="live",
        description="S_k of the current step, or that of the branch point kept throughout",
    )
    metric: Literal["euclidean", "optimizer"] = Field(
        default="euclidean",
        description="optimizer: S_k and the split in the metric of the divisor of Adam or RMSprop,"
        " after the step's update of it",
    )
    source: SplitSourceSpec | None = Field(
        default=None,
        description="a cheap dominant space in place of S_k; that of [subspace] if not given",
    )

    @model_validator(mode="after")
    def _has_one_source(self) -> Self:
        for key, usual in (("basis", "live"), ("metric", "euclidean")):
            given = getattr(self, key)
            if self.source is not None and given != usual:
                raise bad_value(key, given, f"{usual!r} with a source of the split's own")
        return self

    @property
    def changes(self) -> bool:
        """Whether a part of the update is scaled at all."""
        ends = (self.dominant_end, self.bulk_end)
        return (self.dominant, self.bulk) != (1.0, 1.0) or any(x not in (None, 1.0) for x in ends)

    @property
    def is_scheduled(self) -> bool:
        """Whether a factor changes over the phase."""
        ends = ((self.dominant, self.dominant_end), (self.bulk, self.bulk_end))
        return any(end not in (None, start) for start, end in ends)

    def factors(self, step: int, total: int) -> tuple[float, float]:
        """Factors (dominant, bulk) at `step` (from 0) of a phase of at most `total` steps.

        The first step has the first values, the last one the last: a line in between.
        """
        done = min(1.0, step / (total - 1)) if total > 1 else 0.0
        dominant = _on_line(self.dominant, self.dominant_end, done)
        return dominant, _on_line(self.bulk, self.bulk_end, done)


def _on_line(start: float, end: float | None, done: float) -> float:
    return start if end is None else start + done * (end - start)


class PhaseSpec(SpecModel):
    """One optimizer, batch size and split, until an end."""

    name: Name = Field(default="train", description="label of the phase, unique in the trunk")
    optimizer: OptimizerChoice = Field(description="optimizer and its settings")
    schedule: ScheduleChoice = Field(
        default="constant",  # type: ignore[assignment]
        description="change of the learning rate over the phase, after the warm-up",
    )
    warmup_steps: NotNegativeCount = Field(
        default=0, description="steps over which the learning rate rises to its value on a line"
    )
    batch_size: BatchSize = Field(
        default=50, description="samples in a mini-batch, 'all' for full-batch training"
    )
    clip_norm: Positive | None = Field(
        default=None,
        description="greatest norm of the mini-batch gradient, longer ones are scaled down",
    )
    noise: NoiseSpec | None = Field(
        default=None, description="noise of mini-batches added to the gradient, none by default"
    )
    split: SplitSpec | None = Field(
        default=None,
        description="scaling of the two parts of the update, none for the bare optimizer",
    )
    local: LocalSpec | None = Field(
        default=None, description="workers that are averaged now and then, none by default"
    )
    steps: NotNegativeCount | None = Field(
        default=None,
        description="most steps of the phase, the deadline of its until_ rules; 0 in the trunk:"
        " the branches start from the initial parameters",
    )
    epochs: Count | None = Field(
        default=None, description="most passes over the data, instead of steps"
    )
    until_alignment: Alignment | None = Field(
        default=None,
        description="end when the averaged alignment of the full gradient reaches this",
    )
    alignment_ema: Averaging = Field(
        default=0.9,
        description="factor of that exponential moving average, from 0, updated at every step",
    )
    until_loss: float | None = Field(
        default=None, description="end when the full training loss is at or below this"
    )

    @model_validator(mode="after")
    def _ends_once(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            raise bad_value("epochs", self.epochs, "either steps or epochs, not both")
        if self.steps is None and self.epochs is None:
            raise bad_value("steps", None, "an integer >= 0", "a phase ends by steps or by epochs")
        if self.steps is not None and self.warmup_steps > self.steps:
            raise bad_value(
                "warmup_steps", self.warmup_steps, f"at most the phase's steps, {self.steps}"
            )
        return self

    @model_validator(mode="after")
    def _has_what_workers_can_do(self) -> Self:
        if self.local is None:
            return self
        if self.batch_size == "all":
            raise bad_value("batch_size", "all", "a number, with local: workers differ by it alone")
        if self.noise is not None:
            raise bad_value("noise", self.noise, "none, with local", "the workers' noise is theirs")
        if self.split is not None and self.split.changes:
            raise bad_value("split", self.split, "none, with local", "a mean of workers has no S_k")
        return self

    def most_steps(self, num_samples: int) -> int:
        """The bound in steps; an epoch has ceil(samples / samples of a step) of them."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        batch = num_samples if self.batch_size == "all" else self.batch_size
        batch *= 1 if self.local is None else self.local.workers
        return self.epochs * math.ceil(num_samples / batch)

    def split_factors(self, step: int, total: int) -> tuple[float, float]:
        """Factors on the dominant and the bulk part at `step` (from 0) of at most `total` steps."""
        return (1.0, 1.0) if self.split is None else self.split.factors(step, total)

    def learning_rate(self, step: int, total: int) -> float:
        """The learning rate at `step` (from 0) of this phase of at most `total` steps."""
        factor = factor_with_warmup(self.schedule, self.warmup_steps, step, total)
        return self.optimizer.lr * factor
