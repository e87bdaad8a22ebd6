"""What is a stretch of training: with which optimizer, batch size and split, and when does it end?

The trunk is one such phase after another from the start. A branch is one phase that begins at the
trunk's end and takes everything that it does not say itself from the trunk's last phase.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from thalweg.lab.config.learning_rates import ScheduleSettings, factor_with_warmup
from thalweg.lab.config.local import LocalSpec
from thalweg.lab.config.optimizers import OptimizerSettings
from thalweg.lab.config.split import SplitSpec
from thalweg.lab.config.subspace import SubspaceSpec
from thalweg.registry import NAME_PATTERN, NAME_WORDS, optimizers, schedules
from thalweg.settings import Choice, Count, SpecModel, Wording, bad_value

if TYPE_CHECKING:
    from typing import Self

LONGEST_NAME = 64
Name = Annotated[
    str,
    Field(pattern=NAME_PATTERN, max_length=LONGEST_NAME),
    Wording(f"at most {LONGEST_NAME} of {NAME_WORDS}"),
]
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


class BranchSpec(SpecModel):
    """What a branch does otherwise than the last phase of the trunk, or than another branch.

    It starts at the trunk's end, or where `after` says. Not taken over: `until_` rules, warm-up.
    """

    after: Name | None = Field(
        default=None,
        description="branch at whose end this one starts, and whose settings it takes over; the"
        " trunk if not given",
    )
    subspace: SubspaceSpec | None = Field(
        default=None,
        description="the dominant subspace of this branch, the rest as in [subspace]",
    )
    probes: dict[str, Count | Literal["off"]] | None = Field(
        default=None,
        description="what this branch measures otherwise, each every n steps or 'off', the rest as"
        " in [probes]",
    )
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
    noise: NoiseSpec | Literal["off"] | None = Field(
        default=None, description="noise of mini-batches added to the gradient, 'off' for none"
    )
    split: SplitSpec | None = Field(
        default=None, description="scaling of the two parts of the update"
    )
    local: LocalSpec | Literal["off"] | None = Field(
        default=None, description="workers that are averaged now and then, 'off' for none"
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

    def resolve(self, name: str, above: PhaseSpec) -> PhaseSpec:
        """The full phase: what this branch says, the rest from the phase that it starts after.

        Raises:
            pydantic.ValidationError: the two do not fit together.
        """
        own = {
            key: value
            for key in type(self).model_fields
            if key not in ("after", "subspace", "probes")
            and (value := getattr(self, key)) is not None
        }
        left_out = {"name", "warmup_steps", "until_alignment", "until_loss"}
        if "steps" in own or "epochs" in own:
            left_out |= {"steps", "epochs"}
        for key in ("clip_norm", "noise", "local"):
            if own.get(key) == "off":
                left_out.add(key)
                del own[key]
        inherited = {
            key: getattr(above, key) for key in PhaseSpec.model_fields if key not in left_out
        }
        return PhaseSpec.model_validate({**inherited, **own, "name": name})


def with_inherited_tables(raw: dict[str, Any]) -> dict[str, Any]:
    """Complete the tables of branches that say only what is different.

    `optimizer` and `schedule` without a name from the phase that the branch starts after, so that
    `branches.fast.optimizer.lr = 0.1` means the trunk's optimizer with another learning rate;
    `subspace` from the spec's own.
    """
    phases, branches = raw.get("phases"), raw.get("branches")
    if not (isinstance(phases, list | tuple) and phases and isinstance(branches, dict)):
        return raw
    trunk = phases[-1] if isinstance(phases[-1], dict) else {}
    effective: dict[str, dict[str, Any]] = {}
    completed: dict[str, Any] = {}
    for name in _predecessors_first(branches):
        branch = branches[name]
        if isinstance(branch, dict):
            above = effective.get(branch.get("after") or "", trunk)
            branch = _completed(branch, above)
            if isinstance(branch.get("subspace"), dict) and isinstance(raw.get("subspace"), dict):
                branch["subspace"] = {**raw["subspace"], **branch["subspace"]}
            effective[name] = {**above, **branch}
        completed[name] = branch
    return {**raw, "branches": {name: completed[name] for name in branches}}


def _predecessors_first(branches: Mapping[str, Any]) -> list[str]:
    """The names in an order in which each comes after the branch it starts after.

    Those in a circle, or after a branch that does not exist, at the end: the spec's own check
    refuses them.
    """
    after = {
        name: branch.get("after") if isinstance(branch, dict) else None
        for name, branch in branches.items()
    }
    order: list[str] = []
    while ready := [
        name
        for name, above in after.items()
        if name not in order and (above is None or above in order)
    ]:
        order += ready
    return order + [name for name in branches if name not in order]


def _completed(branch: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    result = dict(branch)
    for key in ("optimizer", "schedule"):
        given, inherited = result.get(key), above.get(key)
        inherited = {"name": inherited} if isinstance(inherited, str) else inherited
        if isinstance(given, dict) and "name" not in given and isinstance(inherited, dict):
            result[key] = {**inherited, **given}
    return result
