"""The experiment as data: problem, phases, branches, probes, claims, seeds.

Everything that determines a study's numbers stands here, with the words that explain it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from thalweg.lab.config.phases import FolderName, Name, PhaseSpec, Positive
from thalweg.lab.store.folders import TRUNK
from thalweg.limits import SETTING, limit
from thalweg.problems.problem_spec import ProblemSpec
from thalweg.settings import Count, SpecModel, Wording, bad_value

if TYPE_CHECKING:
    from typing import Self

AT_BRANCH_POINT = ("displacement", "overlap")
"""Probes that compare with theta and S_k at the branch point."""
MOST_THREADS = 1024
MOST_PROCESSES = 4096
"""Of one process: with many more OpenMP ends it without a word."""
Device = Annotated[
    str,
    Field(pattern=r"^(auto|cpu|mps|cuda(:[0-9]+)?)$"),
    Wording("'auto', 'cpu', 'cuda', 'cuda:N' or 'mps'"),
]
Threads = Annotated[int, Field(ge=1, le=MOST_THREADS)]
Processes = Annotated[int, Field(ge=1, le=MOST_PROCESSES)]
Share = Annotated[float, Field(gt=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63), Wording("an integer from 0 to 2^63 - 1")]


USUAL_THRESHOLD = 0.1
"""Of lambda_1."""


class SubspaceSpec(SpecModel):
    """Which subspace is called dominant, and how closely it is followed."""

    k: Count | Literal["classes", "gap"] = Field(
        default="classes",
        description="dimension: a number, the number of classes, or the widest gap",
    )
    source: Literal["tracker", "exact", "threshold", "random", "next"] = Field(
        default="tracker",
        description="tracker: followed from step to step; exact: solved at every step; threshold: "
        "no k, each vector is split at a curvature; as controls random: k random directions, next: "
        "the k eigenvectors below the dominant ones",
    )
    threshold: Positive | None = Field(
        default=None,
        description="curvature tau at which vectors are split, with source = 'threshold'; 0.1 if "
        "not given, of what relative_to says",
    )
    relative_to: Literal["sharpness", "edge", "one"] | None = Field(
        default=None,
        description="unit of the threshold, sharpness if not given: the largest curvature seen; "
        "edge: that at which the phase's optimizer becomes unstable, such as 2 / lr; one: none",
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
    def _has_one_kind_of_split(self) -> Self:
        is_threshold = self.source == "threshold"
        for key in ("threshold", "relative_to"):
            given = getattr(self, key)
            if given is not None and not is_threshold:
                raise bad_value(key, given, "not given, without source = 'threshold'")
        if is_threshold and self.samples is not None:
            raise bad_value("samples", self.samples, "not given, with source = 'threshold'")
        if self.relative_to in (None, "sharpness") and self.tau >= 1:
            raise bad_value("threshold", self.tau, "a number below 1, as a part of lambda_1")
        return self

    @property
    def tau(self) -> float:
        """The threshold, in the unit of `relative_to`."""
        return USUAL_THRESHOLD if self.threshold is None else self.threshold

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


class BranchSpec(PhaseSpec):
    """A phase that starts at the trunk's end, or at the end of another branch.

    In a file a branch says what it does otherwise than the phase it starts from: it is laid over
    that one's table (see `layering`), except for `until_` rules and warm-up.
    """

    starts_from: Name | None = Field(
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
    steps: Count | None = Field(default=None, description="most steps of the branch")


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

    name: FolderName = Field(
        default="main", description="name of the study, part of its folder's name"
    )
    description: str = Field(default="", description="what the study is for")
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = Field(
        default=(0,), description="one run of trunk and branches for each"
    )
    device: Device = Field(default="auto", description="where it is computed")
    dtype: Literal["float32", "float64"] = Field(default="float32", description="of all tensors")
    threads: Threads = Field(default=1, description="CPU threads of each process")
    processes: Processes = Field(
        default=1, description="processes that share each run, as torchrun has started them"
    )
    problem: ProblemSpec = Field(description="data, model, loss")
    subspace: SubspaceSpec = Field(default=SubspaceSpec(), description="the dominant subspace")
    phases: Annotated[tuple[PhaseSpec, ...], Field(min_length=1)] = Field(
        description="the trunk, one phase after the other"
    )
    branches: dict[FolderName, BranchSpec] = Field(
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
    smoke: bool = Field(
        default=False,
        description="make everything tiny, to see whether it runs: no verdict is to be believed",
    )

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

    @property
    def holds_objects(self) -> bool:
        """Whether it has Python objects, at hand or missing, that its text does not hold."""
        phases = (*self.phases, *self.branches.values())
        return not all(one.listed for one in (self.problem.data, *(p.optimizer for p in phases)))

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
        return self.branches[name].starts_from

    @model_validator(mode="after")
    def _branches_lead_back_to_the_trunk(self) -> Self:
        depth: dict[str | None, int] = {None: 0}
        most = limit("spec_chain")
        for name in self.branches:
            chain: dict[str, None] = {}
            here: str | None = name
            while here not in depth:
                if here not in self.branches or here in chain:
                    last = next(reversed(chain))
                    allowed = "a branch that does not itself come after this one"
                    given = self.branches[last].starts_from
                    raise bad_value("starts_from", given, allowed, within=("branches", last))
                chain[here] = None
                here = self.branches[here].starts_from
            for before in reversed(chain):
                depth[before] = depth[self.branches[before].starts_from] + 1
                if depth[before] > most:
                    allowed = f"a branch with less than {most} before it"
                    hint = f"{SETTING}=spec_chain={depth[before]} raises this limit"
                    given = self.branches[before].starts_from
                    within = ("branches", before)
                    raise bad_value("starts_from", given, allowed, hint, within=within)
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
            self._check_phase(phase, self.subspace, ("phases", number))
            if phase.split is not None and phase.split.basis == "frozen":
                allowed = "'live' in the trunk, which has no branch point"
                raise bad_value("basis", "frozen", allowed, within=("phases", number, "split"))
        for name, branch in self.branches.items():
            self._check_phase(branch, branch.subspace or self.subspace, ("branches", name))
            if branch.name != name:
                allowed = f"{name!r}, the name of its table"
                raise bad_value("name", branch.name, allowed, within=("branches", name))
        return self

    def branch_phase(self, name: str) -> PhaseSpec:
        """What a branch trains with: the branch as a phase, without what it alone has."""
        branch = self.branches[name]
        return PhaseSpec.model_construct(**{k: getattr(branch, k) for k in PhaseSpec.model_fields})

    def asks_for_branch_point(self, phase: PhaseSpec) -> bool:
        """Whether a branch with these probes (see `of_branch`) asks for S_k where it starts."""
        is_frozen = phase.split is not None and phase.split.basis == "frozen"
        return is_frozen or not self.probes.keys().isdisjoint(AT_BRANCH_POINT)

    def hands_over_branch_point(self, name: str) -> bool:
        """Whether a branch that starts at the end of this run (branch or trunk) takes its S_k.

        A branch does where it asks for that S_k; one with another subspace finds that for itself.
        """
        return any(
            own.subspace == self.of_branch(name).subspace and own.asks_for_branch_point(branch)
            for other, branch in self.branches.items()
            if (branch.starts_from or TRUNK) == name and (own := self.of_branch(other))
        )

    def _check_phase(
        self, phase: PhaseSpec, subspace: SubspaceSpec, where: tuple[str | int, ...]
    ) -> None:
        samples = self.problem.samples
        if samples is not None and phase.batch_size != "all" and phase.batch_size > samples:
            allowed = f"at most problem.samples, {samples}, or 'all'"
            raise bad_value("batch_size", phase.batch_size, allowed, within=where)
        if subspace.samples == "batch":
            _check_has_one_batch(phase, where)
        is_frozen = phase.split is not None and phase.split.basis == "frozen"
        if subspace.source == "threshold" and is_frozen:
            allowed = "'live' with subspace.source = 'threshold', which has no basis"
            raise bad_value("basis", "frozen", allowed, within=(*where, "split"))


def _check_has_one_batch(phase: PhaseSpec, where: tuple[str | int, ...]) -> None:
    """Refuse a phase that has no one mini-batch whose Hessian its split could be of."""
    if phase.local is not None:
        hint = "each worker has a mini-batch of its own"
        given, allowed = phase.local.model_dump(), "none with subspace.samples = 'batch'"
        raise bad_value("local", given, allowed, hint, within=where)
    for key, usual in (("basis", "live"), ("metric", "euclidean")):
        given = usual if phase.split is None else getattr(phase.split, key)
        if given != usual:
            allowed = f"{usual!r} with subspace.samples = 'batch'"
            raise bad_value(key, given, allowed, within=(*where, "split"))


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
