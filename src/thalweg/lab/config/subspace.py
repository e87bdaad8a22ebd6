"""Which subspace is called dominant, and how closely is it followed?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from thalweg.settings import Count, SpecModel, Wording, bad_value

if TYPE_CHECKING:
    from typing import Self

    from thalweg.lab.config.phases import PhaseSpec

Share = Annotated[float, Field(gt=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63), Wording("an integer from 0 to 2^63 - 1")]


class SubspaceSpec(SpecModel):
    """Which subspace is called dominant, and how closely it is followed."""

    k: Count | Literal["classes", "gap"] = Field(
        default="classes",
        description="dimension: a number, the number of classes, or the widest gap",
    )
    source: Literal["tracker", "exact", "random", "next"] = Field(
        default="tracker",
        description="tracker: followed from step to step; exact: solved at every step; as controls "
        "random: k random directions, next: the k eigenvectors below the dominant ones",
    )
    every: Count = Field(default=1, description="steps from one update of the subspace to the next")
    error: Share = Field(
        default=0.01,
        description="target for the error of a projected vector, relative to the vector",
    )
    bulk_error: Share | None = Field(
        default=None, description="target for that error relative to the vector's bulk part"
    )
    tolerance: Share = Field(
        default=1e-3,
        description="greatest residual of a solve, norm(H u - lambda u) / abs(lambda_1)",
    )
    samples: Count | Literal["batch"] | None = Field(
        default=None,
        description="number of training samples, drawn once at random, whose loss the Hessian is"
        " of; 'batch': the mini-batch that the step trains on; all if not given",
    )
    seed: Seed = Field(
        default=0,
        description="seed of start vectors, subsets and random directions, beside the run's own",
    )

    @model_validator(mode="after")
    def _solves_for_the_batch(self) -> Self:
        if self.samples == "batch" and self.source != "exact":
            raise bad_value(
                "source",
                self.source,
                "'exact' with samples = 'batch'",
                "the Hessian of another mini-batch is solved for at every step, not followed",
            )
        return self

    def refuse_unfit(self, phase: PhaseSpec, where: tuple[str | int, ...]) -> None:
        """A phase that has no one mini-batch whose Hessian its split could be of.

        Raises:
            pydantic_core.PydanticCustomError: with the place in the spec.
        """
        if self.samples != "batch":
            return
        if phase.local is not None:
            mend = "each worker has a mini-batch of its own"
            given, allowed = phase.local.model_dump(), "none with subspace.samples = 'batch'"
            raise bad_value("local", given, allowed, mend, within=where)
        for key, usual in (("basis", "live"), ("metric", "euclidean")):
            given = usual if phase.split is None else getattr(phase.split, key)
            if given != usual:
                allowed = f"{usual!r} with subspace.samples = 'batch'"
                raise bad_value(key, given, allowed, within=(*where, "split"))
