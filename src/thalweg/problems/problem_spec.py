"""Settings of a problem: which data, which model, which loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from thalweg.registry import datasets, losses, models
from thalweg.settings import Choice, Count, Settings, SpecModel, Wording, bad_value

if TYPE_CHECKING:
    from typing import Self


class ProblemSpec(SpecModel):
    """What is trained: data, model, loss."""

    data: Annotated[Settings, Choice(datasets)] = Field(description="data set")
    samples: Count | None = Field(
        default=None, description="number of training samples, the first ones; all if not given"
    )
    balanced: bool = Field(
        default=False, description="take the first samples of each class, equally many of each"
    )
    test_samples: Count | None = Field(
        default=None, description="number of held-out samples, the first ones; all if not given"
    )
    preprocess: Literal["none", "unit", "standardize", "standardize-channel"] = Field(
        default="none",
        description="unit: divide by the largest possible value; standardize: each pixel to mean 0 "
        "and variance 1 over the training samples; standardize-channel: each channel",
    )
    model: Annotated[Settings, Choice(models)] = Field(description="model and its settings")
    loss: Annotated[Settings, Choice(losses)] = Field(description="loss and its settings")
    chunk_size: Count | None = Field(
        default=None,
        description="samples in one pass over the data, bounds memory; measured if not given",
    )
    vectorize_up_to: Annotated[int, Field(ge=0), Wording("an integer >= 0")] | None = Field(
        default=None,
        description="samples in the largest chunk whose block of products with the Hessian is one "
        "vectorized pass, 0: none; measured if not given",
    )

    @model_validator(mode="after")
    def _balance_needs_a_size(self) -> Self:
        if self.balanced and self.samples is None:
            raise bad_value("balanced", True, "false without samples", "give samples")
        return self
