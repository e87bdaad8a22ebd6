"""The experiment as data: problem, phases, branches, probes, claims, seeds.

Everything that determines a study's numbers stands here, with the words that explain it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from thalweg.lab.config.phases import BranchSpec, Name, PhaseSpec, with_inherited_tables
from thalweg.lab.config.subspace import Seed, SubspaceSpec
from thalweg.lab.store.folders import TRUNK
from thalweg.problems.problem_spec import ProblemSpec
from thalweg.settings import Count, SpecModel, Wording, bad_value

if TYPE_CHECKING:
    from typing import Self

Device = Annotated[
    str,
    Field(pattern=r"^(auto|cpu|mps|cuda(:[0-9]+)?)$"),
    Wording("'auto', 'cpu', 'cuda', 'cuda:N' or 'mps'"),
]


class CheckpointSpec(SpecModel):
    """How often a run can be taken up again, and what is kept."""

    every_steps: Count = Field(default=1000, description="steps from one checkpoint to the next")
    every_seconds: Annotated[float, Field(ge=0)] = Field(
        default=30.0, description="seconds from one checkpoint to the next, 0: by steps alone"
    )
    keep: Count = Field(default=2, description="checkpoints that are kept, the newest")
    save_bases: bool = Field(default=False, description="keep the basis of S_k at each checkpoint")


class ClaimSpec(SpecModel):
    """A statement that is tested, and on which branches where it is not plain which."""

    name: str = Field(description="the claim, see `thalweg claims`")
    roles: dict[str, Name] = Field(
        default={},
        description="branches by the part that they play in the claim; default: plain, dominant and"
        " bulk are the first branches that do that",
    )


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
    claims: tuple[str | ClaimSpec, ...] = Field(
        default=(), description="statements that are tested in the end"
    )
    figures: tuple[str, ...] | None = Field(
        default=None, description="what is drawn in the end; all that can be if not given"
    )
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
        uses = [(use.name, tuple(sorted(use.roles.items()))) for use in self.claim_uses]
        for number, use in enumerate(uses):
            if use in uses[:number]:
                raise bad_value("claims", use[0], "each claim once for the same branches")
        _check_phase_names(self.phases)
        _check_branch_names(self.branches)
        return self

    @property
    def claim_uses(self) -> tuple[ClaimSpec, ...]:
        """The claims, each as a table."""
        return tuple(ClaimSpec(name=c) if isinstance(c, str) else c for c in self.claims)

    def of_branch(self, name: str) -> Spec:
        """The spec as a branch (or the trunk) computes with it: its own subspace and probes."""
        branch = self.branches.get(name)
        if branch is None:
            return self
        both = {**self.probes, **(branch.probes or {})}
        probes = {probe: every for probe, every in both.items() if every != "off"}
        return self.model_copy(
            update={"subspace": branch.subspace or self.subspace, "probes": probes}
        )

    @property
    def all_probes(self) -> tuple[str, ...]:
        """The names of all probes that the trunk or a branch has."""
        of_each = [self.probes, *(self.of_branch(name).probes for name in self.branches)]
        return tuple(dict.fromkeys(probe for probes in of_each for probe in probes))

    def before(self, name: str) -> str | None:
        """The branch at whose end a branch starts; None for the trunk's."""
        return self.branches[name].after

    @model_validator(mode="after")
    def _branches_lead_back_to_the_trunk(self) -> Self:
        for name in self.branches:
            seen, here = [name], self.branches[name].after
            while here is not None:
                if here not in self.branches or here in seen:
                    allowed = "a branch that does not itself come after this one"
                    given = self.branches[seen[-1]].after
                    raise bad_value("after", given, allowed, within=("branches", seen[-1]))
                seen.append(here)
                here = self.branches[here].after
        return self

    @model_validator(mode="after")
    def _claims_name_branches(self) -> Self:
        for number, use in enumerate(self.claim_uses):
            for role, branch in use.roles.items():
                if branch not in self.branches and branch != TRUNK:
                    allowed = "one of the branches " + ", ".join((TRUNK, *self.branches))
                    within = ("claims", number, "roles")
                    raise bad_value(role, branch, allowed, within=within)
        return self

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Self:
        if self.device == "mps" and self.dtype == "float64":
            raise bad_value("dtype", self.dtype, "'float32' on device 'mps'")
        for number, phase in enumerate(self.phases):
            self._check_phase(phase, ("phases", number))
            self.subspace.refuse_unfit(phase, ("phases", number))
            if phase.split is not None and phase.split.basis == "frozen":
                allowed = "'live' in the trunk, which has no branch point"
                raise bad_value("basis", "frozen", allowed, within=("phases", number, "split"))
        for name in self.branches:
            self._check_phase(self.branch_phase(name), ("branches", name))
            own = self.of_branch(name).subspace
            own.refuse_unfit(self.branch_phase(name), ("branches", name))
        return self

    def branch_phase(self, name: str) -> PhaseSpec:
        """The full phase of a branch, with what it takes from the phase that it starts after."""
        after = self.branches[name].after
        above = self.phases[-1] if after is None else self.branch_phase(after)
        try:
            return self.branches[name].resolve(name, above)
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
    seen: dict[str, str] = {TRUNK: "the trunk"}
    for name in branches:
        taken = seen.get(name.casefold())
        if taken is not None:
            allowed = f"a name whose folder is not that of {taken}"
            raise bad_value(name, name, allowed, within=("branches",))
        seen[name.casefold()] = f"branch {name!r}"
