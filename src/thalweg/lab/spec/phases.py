"""What is a stretch of training: with which optimizer, batch size and split, and when does it end?

The trunk is one such phase after another from the start. A branch is one phase that begins at the
trunk's end and takes everything that it does not say itself from the trunk's last phase.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from thalweg.lab.registry import NAME_PATTERN, SpecModel, bad_value
from thalweg.lab.spec.fields import NAME_WORDS, Wording
from thalweg.lab.spec.learning_rates import ScheduleSettings, factor_with_warmup, schedules
from thalweg.lab.spec.optimizers import OptimizerSettings, optimizers

if TYPE_CHECKING:
    from typing import Self

LONGEST_NAME = 64
Name = Annotated[
    str,
    Field(pattern=NAME_PATTERN, max_length=LONGEST_NAME),
    Wording(f"at most {LONGEST_NAME} of {NAME_WORDS}"),
]
Count = Annotated[int, Field(ge=1)]
NotNegativeCount = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
OptimizerChoice = Annotated[OptimizerSettings, optimizers.choice()]
ScheduleChoice = Annotated[ScheduleSettings, schedules.choice()]
BatchSize = Count | Literal["all"]
Alignment = Annotated[float, Field(gt=0, le=1)]
Averaging = Annotated[float, Field(ge=0, lt=1)]


class SplitSpec(SpecModel):
    """How the dominant and the bulk part of each proposed update are scaled."""

    dominant: float = Field(default=1.0, description="factor on the part of the update in S_k")
    bulk: float = Field(default=1.0, description="factor on the rest of the update")
    basis: Literal["live", "frozen"] = Field(
        default="live",
        description="S_k of the current step, or that of the branch point kept throughout",
    )


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
    split: SplitSpec | None = Field(
        default=None,
        description="scaling of the two parts of the update, none for the bare optimizer",
    )
    steps: Count | None = Field(
        default=None, description="most steps of the phase, the deadline of its until_ rules"
    )
    epochs: Count | None = Field(
        default=None, description="most passes over the data, instead of steps"
    )
    until_alignment: Alignment | None = Field(
        default=None,
        description="end when the averaged alignment of the full gradient reaches this",
    )
    alignment_average: Averaging = Field(
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
            raise bad_value("steps", None, "an integer >= 1", "a phase ends by steps or by epochs")
        if self.steps is not None and self.warmup_steps > self.steps:
            raise bad_value(
                "warmup_steps", self.warmup_steps, f"at most the phase's steps, {self.steps}"
            )
        return self

    def most_steps(self, num_samples: int) -> int:
        """The bound in steps; an epoch has ceil(samples / batch size) of them."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        batch = num_samples if self.batch_size == "all" else self.batch_size
        return self.epochs * math.ceil(num_samples / batch)

    def learning_rate(self, step: int, total: int) -> float:
        """The learning rate at `step` (from 0) of this phase of at most `total` steps."""
        factor = factor_with_warmup(self.schedule, self.warmup_steps, step, total)
        return self.optimizer.lr * factor


class BranchSpec(SpecModel):
    """What a branch does otherwise than the last phase of the trunk.

    Not taken from the trunk: its `until_` rules and its warm-up.
    """

    optimizer: OptimizerChoice | None = Field(
        default=None,
        description="optimizer; without a name, the trunk's with these settings changed",
    )
    schedule: ScheduleChoice | None = Field(
        default=None,
        description="schedule over the branch's own steps; without a name, as for optimizer",
    )
    warmup_steps: NotNegativeCount = Field(
        default=0, description="steps of the branch's own warm-up"
    )
    batch_size: BatchSize | None = Field(
        default=None, description="samples in a mini-batch, or 'all'"
    )
    clip_norm: Positive | Literal["off"] | None = Field(
        default=None, description="greatest norm of the mini-batch gradient, 'off' for no clipping"
    )
    split: SplitSpec | None = Field(
        default=None, description="scaling of the two parts of the update"
    )
    steps: Count | None = Field(default=None, description="most steps of the branch")
    epochs: Count | None = Field(
        default=None, description="most passes over the data, instead of steps"
    )
    until_alignment: Alignment | None = Field(
        default=None,
        description="end when the averaged alignment of the full gradient reaches this",
    )
    alignment_average: Averaging | None = Field(
        default=None, description="factor of that exponential moving average"
    )
    until_loss: float | None = Field(
        default=None, description="end when the full training loss is at or below this"
    )

    def resolve(self, name: str, trunk: PhaseSpec) -> PhaseSpec:
        """The full phase: what this branch says, the rest from the trunk's last phase.

        Raises:
            pydantic.ValidationError: the two do not fit together.
        """
        own = {
            key: value
            for key in type(self).model_fields
            if (value := getattr(self, key)) is not None
        }
        left_out = {"name", "warmup_steps", "until_alignment", "until_loss"}
        if "steps" in own or "epochs" in own:
            left_out |= {"steps", "epochs"}
        if own.get("clip_norm") == "off":
            left_out.add("clip_norm")
            del own["clip_norm"]
        inherited = {
            key: getattr(trunk, key) for key in PhaseSpec.model_fields if key not in left_out
        }
        return PhaseSpec.model_validate({**inherited, **own, "name": name})


def with_inherited_tables(raw: dict[str, Any]) -> dict[str, Any]:
    """Complete a branch's `optimizer` or `schedule` table that has no name from the last phase's.

    So `branches.fast.optimizer.lr = 0.1` means the trunk's optimizer with another learning rate.
    """
    phases, branches = raw.get("phases"), raw.get("branches")
    if not (isinstance(phases, list | tuple) and phases and isinstance(branches, dict)):
        return raw
    last = phases[-1] if isinstance(phases[-1], dict) else {}
    completed = {name: _completed(branch, last) for name, branch in branches.items()}
    return {**raw, "branches": completed}


def _completed(branch: Any, last: dict[str, Any]) -> Any:
    if not isinstance(branch, dict):
        return branch
    result = dict(branch)
    for key in ("optimizer", "schedule"):
        given, above = result.get(key), last.get(key)
        if isinstance(given, dict) and "name" not in given:
            above = {"name": above} if isinstance(above, str) else above
            if isinstance(above, dict):
                result[key] = {**above, **given}
    return result
