"""Which subspace is called dominant, and how closely is it followed?"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from thalweg.lab.registry import SpecModel
from thalweg.lab.spec.fields import Wording

Count = Annotated[int, Field(ge=1)]
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
    samples: Count | None = Field(
        default=None,
        description="number of training samples, drawn at random, whose loss the Hessian is of; all"
        " if not given",
    )
    seed: Seed = Field(
        default=0,
        description="seed of start vectors, subsets and random directions, beside the run's own",
    )
