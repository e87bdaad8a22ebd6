"""The experiment as data: problem, phases, branches, probes, claims, seeds.

Everything that determines a study's numbers stands here, with the words that explain it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from thalweg.lab.registry import Settings, SpecModel, bad_value, datasets, losses, models
from thalweg.lab.spec.fields import Wording
from thalweg.lab.spec.phases import (
    BranchSpec,
    Count,
    Name,
    PhaseSpec,
    with_inherited_tables,
)

if TYPE_CHECKING:
    from typing import Self

Share = Annotated[float, Field(gt=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63), Wording("an integer from 0 to 2^63 - 1")]
Device = Annotated[
    str,
    Field(pattern=r"^(auto|cpu|mps|cuda(:[0-9]+)?)$"),
    Wording("'auto', 'cpu', 'cuda', 'cuda:N' or 'mps'"),
]


class ProblemSpec(SpecModel):
    """What is trained: data, model, loss."""

    data: Annotated[Settings, datasets.choice()] = Field(description="data set")
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
    model: Annotated[Settings, models.choice()] = Field(description="model and its settings")
    loss: Annotated[Settings, losses.choice()] = Field(description="loss and its settings")
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
    seed: Seed = Field(
        default=0,
        description="seed of start vectors, subsets and random directions, beside the run's own",
    )


class CheckpointSpec(SpecModel):
    """How often a run can be taken up again, and what is kept."""

    every_steps: Count = Field(default=1000, description="steps from one checkpoint to the next")
    every_seconds: Annotated[float, Field(ge=0)] = Field(
        default=30.0, description="seconds from one checkpoint to the next, 0: by steps alone"
    )
    keep: Count = Field(default=2, description="checkpoints that are kept, the newest")
    save_bases: bool = Field(default=False, description="keep the basis of S_k at each checkpoint")


class Spec(SpecModel):
    """A study: one problem, a trunk of phases, and the branches that start at its end."""

    name: Name = Field(default="main", description="name of the study, part of its folder's name")
    description: str = Field(default="", description="what the study is for")
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = Field(
        default=(0,), description="one run of trunk and branches for each"
    )
    device: Device = Field(default="auto", description="where it is computed")
    dtype: Literal["float32", "float64"] = Field(default="float32", description="of all tensors")
    threads: Count = Field(default=1, description="CPU threads of each process")
    problem: ProblemSpec = Field(description="data, model, loss")
    subspace: SubspaceSpec = Field(default=SubspaceSpec(), description="the dominant subspace")
    phases: Annotated[tuple[PhaseSpec, ...], Field(min_length=1)] = Field(
        description="the trunk, one phase after the other"
    )
    branches: dict[Name, BranchSpec] = Field(
        default={}, description="what goes on from the trunk's last checkpoint, by name"
    )
    probes: dict[str, Count] = Field(
        default={}, description="what is measured, each every n steps; nothing else is"
    )
    claims: tuple[str, ...] = Field(default=(), description="statements that are tested in the end")
    checkpoint: CheckpointSpec = Field(default=CheckpointSpec(), description="checkpoints")
    initial_checkpoint: str | None = Field(
        default=None, description="safetensors file with the parameters to start from"
    )

    @model_validator(mode="before")
    @classmethod
    def _complete_branches(cls, data: Any) -> Any:
        return with_inherited_tables(data) if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _names_are_distinct(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds):
            raise bad_value("seeds", self.seeds, "each seed once")
        if len(set(self.claims)) < len(self.claims):
            raise bad_value("claims", self.claims, "each claim once")
        _check_phase_names(self.phases)
        _check_branch_names(self.branches)
        return self

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Self:
        if self.device == "mps" and self.dtype == "float64":
            raise bad_value("dtype", self.dtype, "'float32' on device 'mps'")
        for number, phase in enumerate(self.phases):
            self._check_phase(phase, ("phases", number))
            if phase.split is not None and phase.split.basis == "frozen":
                allowed = "'live' in the trunk, which has no branch point"
                raise bad_value("basis", "frozen", allowed, within=("phases", number, "split"))
        for name in self.branches:
            self._check_phase(self.branch_phase(name), ("branches", name))
        return self

    def branch_phase(self, name: str) -> PhaseSpec:
        """The full phase of a branch, with what it takes from the trunk's last phase."""
        try:
            return self.branches[name].resolve(name, self.phases[-1])
        except ValidationError as error:
            first = error.errors()[0]
            context = first.get("ctx", {})
            raise bad_value(
                str(first["loc"][-1]),
                context.get("given"),
                context.get("allowed", first["msg"]),
                context.get("mend", ""),
                within=("branches", name, *first["loc"][:-1]),
            ) from None

    def _check_phase(self, phase: PhaseSpec, where: tuple[str | int, ...]) -> None:
        samples = self.problem.samples
        if samples is not None and phase.batch_size != "all" and phase.batch_size > samples:
            allowed = f"at most problem.samples, {samples}, or 'all'"
            raise bad_value("batch_size", phase.batch_size, allowed, within=where)


def _check_phase_names(phases: tuple[PhaseSpec, ...]) -> None:
    seen: set[str] = set()
    for number, phase in enumerate(phases):
        if phase.name in seen:
            allowed = "a name that no earlier phase has"
            raise bad_value("name", phase.name, allowed, within=("phases", number))
        seen.add(phase.name)


def _check_branch_names(branches: dict[str, BranchSpec]) -> None:
    """Folder names: 'trunk' is taken, and some file systems take 'SGD' for 'sgd'."""
    seen: dict[str, str] = {"trunk": "the trunk"}
    for name in branches:
        taken = seen.get(name.casefold())
        if taken is not None:
            allowed = f"a name whose folder is not that of {taken}"
            raise bad_value(name, name, allowed, within=("branches",))
        seen[name.casefold()] = f"branch {name!r}"
