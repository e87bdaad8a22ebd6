"""How is each update split, what is each part scaled by, and what is called dominant there?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from thalweg.settings import Count, SpecModel, Wording, bad_value

if TYPE_CHECKING:
    from typing import Self


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
