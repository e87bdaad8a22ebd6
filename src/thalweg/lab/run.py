"""One run: the trunk of a seed, or a branch from its last checkpoint; step by step, resumable.

The natural way through a step at theta_t:

    batch (seed, t) -> gradient -> optimizer proposes -> split on S_k(theta_t) -> probes -> row t

Everything that the next step depends on is in the checkpoint, so a run that was killed goes on bit
for bit as if nothing had happened.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from thalweg.curvature import (
    FixedSubspace,
    Hessian,
    Objective,
    Subspace,
    SubspaceSource,
    SubspaceTracker,
    random_subspace,
    top_eigenpairs,
)
from thalweg.curvature.controls import NextEigenspace
from thalweg.dynamics import PROBES, BranchPoint, Moment, Probe
from thalweg.errors import Diverged, Interrupted, InvalidInput
from thalweg.lab.minibatches import minibatch
from thalweg.lab.problems import Problem, build_problem
from thalweg.lab.run_names import END_PHASE, TRUNK
from thalweg.lab.spec import PhaseSpec, Spec
from thalweg.lab.store import RunFolder, StudyFolder
from thalweg.lab.store.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    load_checkpoint,
    load_parameters,
    pack_state,
    save_checkpoint,
    unpack_state,
)
from thalweg.lab.store.metrics import Column, MetricsWriter
from thalweg.lab.store.status import Status
from thalweg.optim import SplitUpdate

STATUS_SECONDS = 1.0
GAP_CANDIDATES = 21


@dataclass
class Position:
    """Where a run stands: everything of its state that is not a tensor of the model."""

    step: int = 0
    start: int = 0
    phase: int = 0
    phase_start: int = 0
    alignment_average: float | None = None
    finished: bool = False
    # The subspace's cost since the last recorded row: renewals fall between measured steps too.
    steps_since_row: int = 0
    gradients_since_row: float = 0.0


@dataclass
class _Clock:
    """When things are due that depend on time and change no number."""

    begun: float = field(default_factory=time.monotonic)
    checkpoint: float = field(default_factory=time.monotonic)
    status: float = 0.0
    earlier_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        return self.earlier_seconds + time.monotonic() - self.begun


class Run:
    """One run of a study in its folder; `execute` takes it to its end, from wherever it stands.

    Args:
        spec: the resolved spec of the study.
        study: its folder.
        seed: which seed.
        branch: name of the branch, or "trunk".
        device: where to compute, such as "cpu" or "cuda:1".
        should_stop: asked at every step; True saves a checkpoint and raises `Interrupted`.
    """

    def __init__(
        self,
        spec: Spec,
        study: StudyFolder,
        seed: int,
        branch: str,
        *,
        device: str = "cpu",
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.spec = spec
        self.study = study
        self.folder: RunFolder = study.run(seed, branch)
        self.seed = seed
        self.branch = branch
        self.should_stop = should_stop
        self.phases: tuple[PhaseSpec, ...] = (
            spec.phases if branch == TRUNK else (spec.branch_phase(branch),)
        )
        self.problem: Problem = build_problem(
            spec.problem, seed, getattr(torch, spec.dtype), device
        )
        self.objective = make_objective(spec, self.problem)
        self.k = number_of_directions(spec, self.problem, self.objective)
        self.probes: dict[str, Probe] = {name: PROBES[name] for name in spec.probes}
        self.position = Position()
        self.branch_point: BranchPoint | None = None
        self.source: SubspaceSource = self._make_source()
        self.optimizer: Optimizer = self._make_optimizer()
        self._clock = _Clock()
        self._last: dict[str, Any] = {}

    @property
    def phase(self) -> PhaseSpec:
        """The phase that the run is in."""
        return self.phases[self.position.phase]

    def execute(self) -> None:
        """Train from the last checkpoint, or from the start, to the end; write everything.

        Raises:
            Diverged: a loss or product became NaN or infinite; what was measured is kept.
            Interrupted: `should_stop` said so; a checkpoint was saved.
            IntegrityError: a checkpoint is damaged.
        """
        with self.folder.locked():
            self._begin()
            columns = [Column("step", "integer"), Column("learning_rate"), *self._columns()]
            with MetricsWriter(self.folder.metrics, columns) as metrics:
                metrics.truncate(self.position.step)
                try:
                    self._loop(metrics)
                except Diverged as error:
                    self._record_divergence(metrics)
                    self._write_status("diverged", f"step {self.position.step}: {error}")
                    self.folder.log(f"diverged at step {self.position.step}: {error}")
                    raise
                metrics.compact()
        self._write_status("done")

    def _begin(self) -> None:
        torch.manual_seed(self.seed)
        newest = latest_checkpoint(self.folder.checkpoints)
        status = self.folder.status()
        if newest is not None:
            self._restore(load_checkpoint(newest))
            self._clock.earlier_seconds = status.seconds if status else 0.0
            self.folder.log(f"resumed at step {self.position.step}")
        elif self.branch == TRUNK:
            self._load_initial_parameters()
            self.folder.log("started")
        else:
            self._start_branch()
            self.folder.log(f"started at step {self.position.step}")

    def _loop(self, metrics: MetricsWriter) -> None:
        while self._in_phase():
            self._checkpoint_if_due(metrics)
            moment = self._moment()
            if self._phase_ends(moment):
                self._next_phase()
                continue
            self._train_one_step(moment)
            self._record(metrics, moment)
            self.position.step += 1
            self._add_cost(moment)
            self._status_if_due()
        self._checkpoint(metrics, permanent=True)
        moment = self._moment()
        self._record(metrics, moment, last=True)

    # Ends of phases.

    def _in_phase(self) -> bool:
        """Whether a step remains; moves on to the next phase where the bound is reached."""
        while not self.position.finished:
            done = self.position.step - self.position.phase_start
            if done < self.phase.most_steps(self.problem.num_samples):
                return True
            self._warn_if_rule_never_fired()
            self._next_phase()
        # A finished run whose bound was raised goes on.
        last = self.phases[-1]
        done = self.position.step - self.position.phase_start
        rules = last.until_alignment is not None or last.until_loss is not None
        if not rules and done < last.most_steps(self.problem.num_samples):
            self.position.finished = False
            return True
        return False

    def _phase_ends(self, moment: Moment) -> bool:
        """The rules that end a phase before its bound, at the clock of one look a step."""
        phase, position = self.phase, self.position
        if phase.until_alignment is not None:
            chi = moment.subspace.alignment(moment.gradient)
            average, factor = position.alignment_average, phase.alignment_average
            average = chi if average is None else factor * average + (1 - factor) * chi
            position.alignment_average = average
            if average >= phase.until_alignment:
                self.folder.log(
                    f"phase {phase.name!r} ends at step {position.step}: averaged alignment"
                    f" {average:.4f} reached {phase.until_alignment}"
                )
                return True
        if phase.until_loss is not None and moment.loss <= phase.until_loss:
            self.folder.log(f"phase {phase.name!r} ends at step {position.step}: loss reached")
            return True
        by_hand = self.folder.path / END_PHASE
        if by_hand.exists():
            by_hand.unlink()
            self.folder.log(f"phase {phase.name!r} ends at step {position.step}: by hand")
            return True
        return False

    def _next_phase(self) -> None:
        position = self.position
        if position.phase + 1 == len(self.phases):
            position.finished = True
            return
        position.phase += 1
        position.phase_start = position.step
        position.alignment_average = None
        self.optimizer = self._make_optimizer()

    def _warn_if_rule_never_fired(self) -> None:
        phase = self.phase
        if phase.until_alignment is None and phase.until_loss is None:
            return
        average = self.position.alignment_average
        reached = "" if average is None else f" (averaged alignment {average:.3f})"
        self._last["message"] = (
            f"phase {phase.name!r}: its rule never fired{reached}; ended at the deadline, step"
            f" {self.position.step}"
        )
        self.folder.log("warning: " + self._last["message"])

    # One step.

    def _moment(self) -> Moment:
        theta = self.objective.theta()
        if not bool(torch.isfinite(theta).all()):
            raise Diverged("a parameter is NaN or infinite")
        done = self.position.step - self.position.phase_start
        bound = self.phase.most_steps(self.problem.num_samples)
        return Moment(
            step=self.position.step,
            theta=theta,
            objective=self.objective,
            source=self.source,
            learning_rate=self.phase.learning_rate(min(done, bound - 1), bound),
            branch_point=self.branch_point,
            evaluate_test=None if self.problem.test is None else self._evaluate_test,
            solve=self._solve,
        )

    def _train_one_step(self, moment: Moment) -> None:
        phase, problem = self.phase, self.problem
        size = problem.num_samples if phase.batch_size == "all" else phase.batch_size
        chosen = minibatch(self.seed, moment.step, size, problem.num_samples)
        inputs, targets = (part[chosen.to(part.device)] for part in problem.train)
        self.optimizer.zero_grad()
        loss = problem.loss(problem.model(inputs), targets)
        loss.backward()
        if phase.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(problem.model.parameters(), phase.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = moment.learning_rate
        moment.minibatch_loss = float(loss.detach())
        parameters = self.objective.layout.parameters(problem.model)
        moment.minibatch_gradient = torch.cat(
            [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in parameters]
        )
        if not torch.isfinite(loss.detach()):
            raise Diverged(f"the mini-batch loss is {moment.minibatch_loss}")
        self.optimizer.step()
        moment.update = self.objective.theta() - moment.theta
        if isinstance(self.optimizer, SplitUpdate):
            self._note_split(moment, self.optimizer)
        else:
            moment.proposed = moment.update

    def _note_split(self, moment: Moment, optimizer: SplitUpdate) -> None:
        """The parts that the split computed, refined where it refined them, serve the probes."""
        assert optimizer.proposed is not None
        moment.proposed = optimizer.proposed
        if optimizer.split is not None and optimizer.source is self.source:
            moment.subspace_updated = True
            moment.keep_parts(optimizer.split, optimizer.dominant, optimizer.bulk)

    def _record(self, metrics: MetricsWriter, moment: Moment, *, last: bool = False) -> None:
        first = moment.step == self.position.start
        due = [
            probe
            for name, probe in self.probes.items()
            if first or last or moment.step % self.spec.probes[name] == 0
        ]
        if not due:
            return
        moment.steps_before, moment.gradients_before = (
            self.position.steps_since_row,
            self.position.gradients_since_row,
        )
        self.position.steps_since_row, self.position.gradients_since_row = -1, 0.0
        row: dict[str, Any] = {"step": moment.step, "learning_rate": moment.learning_rate}
        for probe in due:
            row.update(probe.measure(moment))
        metrics.append(row)
        for name in ("loss", "alignment_gradient", "sharpness"):
            if row.get(name) is not None:
                self._last[name] = row[name]

    def _add_cost(self, moment: Moment) -> None:
        position = self.position
        position.steps_since_row += 1
        # The step of a row reports its own cost.
        if position.steps_since_row > 0 and moment.used_subspace:
            position.gradients_since_row += self.source.report.gradients

    def _record_divergence(self, metrics: MetricsWriter) -> None:
        """A last row whose loss is NaN, so that the table itself says what happened."""
        step = self.position.step
        if "loss" in self.probes and (metrics.last_step is None or metrics.last_step < step):
            rate = self.phase.learning_rate(0, 1)
            metrics.append({"step": step, "learning_rate": rate, "loss": float("nan")})
        metrics.flush()

    def _evaluate_test(self, theta: Tensor) -> tuple[float, float | None]:
        assert self.problem.test is not None
        model, inputs, targets = self.problem.model, *self.problem.test
        now = self.objective.theta()
        self.objective.layout.write(model, theta)
        model.eval()
        size = self.objective.chunk_size or len(inputs)
        loss = correct = 0.0
        with torch.no_grad():
            for x, y in zip(inputs.split(size), targets.split(size), strict=True):
                output = model(x)
                loss += float(self.problem.loss(output, y)) * len(x)
                if self.problem.num_classes is not None:
                    correct += float(self.problem.accuracy(output, y)) * len(x)
        model.train()
        self.objective.layout.write(model, now)
        accuracy = None if self.problem.num_classes is None else correct / len(inputs)
        return loss / len(inputs), accuracy

    def _solve(self, theta: Tensor, k: int) -> Subspace:
        hessian = Hessian(self.objective, theta, keep_graph=True)
        return top_eigenpairs(
            hessian,
            min(k, self.objective.num_parameters),
            tolerance=self.spec.subspace.tolerance,
            check_repeated=0,
        )

    # What a run is made of.

    def _make_source(self) -> SubspaceSource:
        settings = self.spec.subspace
        seed = settings.seed + self.seed
        if settings.source == "random":
            size = self.objective.num_parameters
            drawn = random_subspace(size, self.k, seed, dtype=self.objective.dtype)
            return FixedSubspace(drawn.to(self.objective.device))
        if settings.source == "next":
            return NextEigenspace(self.objective, self.k, tolerance=settings.tolerance)
        return SubspaceTracker(
            self.objective,
            self.k,
            error=settings.error,
            bulk_error=settings.bulk_error,
            exact=settings.source == "exact",
            every=settings.every,
            tolerance=settings.tolerance,
            seed=seed,
        )

    def _make_optimizer(self) -> Optimizer:
        phase = self.phase
        named = [(n, p) for n, p in self.problem.model.named_parameters() if p.requires_grad]
        optimizer = phase.optimizer.build(named)
        if phase.split is None or (phase.split.dominant, phase.split.bulk) == (1.0, 1.0):
            return optimizer
        source = self.source
        if phase.split.basis == "frozen":
            if self.branch_point is None:
                # Replaced once the branch point is known.
                return optimizer
            source = FixedSubspace(self.branch_point.subspace)
        return SplitUpdate(
            optimizer,
            source,
            phase.split.dominant,
            phase.split.bulk,
            parameters=self.objective.layout.parameters(self.problem.model),
        )

    def _columns(self) -> list[Column]:
        return [
            Column(column, "vector" if column in probe.vectors else "float")
            for probe in self.probes.values()
            for column in probe.columns
        ]

    def _load_initial_parameters(self) -> None:
        if self.spec.initial_checkpoint is None:
            return
        given = load_parameters(self.spec.initial_checkpoint)
        try:
            self.problem.model.load_state_dict(given)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise InvalidInput(
                f"initial_checkpoint {self.spec.initial_checkpoint}: {reason}"
            ) from None

    def _start_branch(self) -> None:
        trunk = self.study.run(self.seed, TRUNK)
        newest = latest_checkpoint(trunk.checkpoints)
        state = None if newest is None else _unpacked(load_checkpoint(newest))
        if state is None or not state["position"]["finished"]:
            raise InvalidInput(f"{trunk.path}: the trunk is not finished; run it first")
        step = state["position"]["step"]
        self.position = Position(step=step, start=step, phase_start=step)
        self._restore_model(state)
        theta = self.objective.theta()
        if self._needs_branch_point():
            self.branch_point = BranchPoint(theta, self._branch_subspace(theta))
        self.optimizer = self._make_optimizer()
        trunk_optimizer = self.spec.phases[-1].optimizer
        if self.phase.optimizer.registered_name == trunk_optimizer.registered_name:
            # The same optimizer goes on with its momentum.
            self.optimizer.load_state_dict(state["optimizer"])

    def _branch_subspace(self, theta: Tensor) -> Subspace:
        self.source.update(theta)
        return self.source.subspace

    def _needs_branch_point(self) -> bool:
        frozen = self.phase.split is not None and self.phase.split.basis == "frozen"
        return frozen or not {"displacement", "overlap"}.isdisjoint(self.spec.probes)

    # Checkpoints.

    def _checkpoint_if_due(self, metrics: MetricsWriter) -> None:
        settings, position = self.spec.checkpoint, self.position
        if self.should_stop():
            self._checkpoint(metrics)
            self._write_status("interrupted", "stopped on request; thalweg resume goes on")
            self.folder.log(f"interrupted at step {position.step}")
            raise Interrupted(f"{self.folder.path}: stopped at step {position.step}")
        since = time.monotonic() - self._clock.checkpoint
        due = settings.every_seconds and since >= settings.every_seconds
        if due or (position.step > position.start and position.step % settings.every_steps == 0):
            self._checkpoint(metrics)

    def _checkpoint(self, metrics: MetricsWriter, *, permanent: bool = False) -> None:
        # Rows first: a checkpoint must never be ahead of what was measured before it.
        metrics.flush()
        tensors, state = pack_state(self._state())
        save_checkpoint(
            self.folder.checkpoints,
            self.position.step,
            tensors,
            state,
            keep=self.spec.checkpoint.keep,
            permanent=permanent,
        )
        self._clock.checkpoint = time.monotonic()

    def _state(self) -> dict[str, Any]:
        point = self.branch_point
        return {
            "position": vars(self.position).copy(),
            "parameters": {
                name: tensor.detach() for name, tensor in self.problem.model.state_dict().items()
            },
            "optimizer": self.optimizer.state_dict(),
            "source": self.source.state_dict(),
            "branch_point": None
            if point is None
            else {
                "theta": point.theta,
                "rows": point.subspace.basis.T,
                "eigenvalues": point.subspace.eigenvalues,
            },
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "last": dict(self._last),
        }

    def _restore(self, checkpoint: Checkpoint) -> None:
        state = _unpacked(checkpoint, self.objective.device)
        self.position = Position(**state["position"])
        self._restore_model(state)
        point = state["branch_point"]
        if point is not None:
            subspace = Subspace(point["rows"].T, point["eigenvalues"])
            self.branch_point = BranchPoint(point["theta"], subspace)
        self.source.load_state_dict(state["source"])
        self.optimizer = self._make_optimizer()
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"].cpu())
        if state["random_cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all([s.cpu() for s in state["random_cuda"]])
        self._last = state["last"]

    def _restore_model(self, state: dict[str, Any]) -> None:
        self.problem.model.load_state_dict(state["parameters"])

    # Status.

    def _status_if_due(self) -> None:
        now = time.monotonic()
        if now - self._clock.status >= STATUS_SECONDS:
            self._clock.status = now
            self._write_status("running")

    def _write_status(self, state: Any, message: str | None = None) -> None:
        position = self.position
        bound = self.phases[-1].most_steps(self.problem.num_samples)
        last_phase = position.phase == len(self.phases) - 1
        self.folder.write_status(
            Status(
                state=state,
                step=position.step,
                end_step=position.phase_start + bound if last_phase else None,
                seconds=self._clock.seconds,
                loss=self._last.get("loss"),
                alignment=self._last.get("alignment_gradient"),
                sharpness=self._last.get("sharpness"),
                message=self._last.get("message", "") if message is None else message,
            )
        )


def number_of_directions(spec: Spec, problem: Problem, objective: Objective) -> int:
    """k: as given, the number of classes, or where the spectrum has its widest gap.

    The gap is that of the initial parameters' Hessian, the same for all runs of a seed.

    Raises:
        InvalidInput: the problem has no classes, so k must be given.
    """
    k = spec.subspace.k
    if k == "gap":
        return widest_gap(top_eigenvalues(objective, GAP_CANDIDATES))
    if k == "classes":
        if problem.num_classes is None:
            raise InvalidInput(
                "subspace.k: 'classes' was asked for, but the problem has none; give a number, or"
                " 'gap'"
            )
        return problem.num_classes
    return k


def top_eigenvalues(objective: Objective, count: int) -> Tensor:
    """The top eigenvalues at the model's current parameters, at most P of them."""
    hessian = Hessian(objective, keep_graph=True)
    count = min(count, objective.num_parameters)
    return top_eigenpairs(hessian, count, check_repeated=0).eigenvalues


def widest_gap(eigenvalues: Tensor) -> int:
    """The k for which lambda_k / lambda_{k+1} is largest among the positive eigenvalues given."""
    positive = eigenvalues[eigenvalues > 0]
    if len(positive) < 2:
        return 1
    return int((positive[:-1] / positive[1:]).argmax()) + 1


def make_objective(spec: Spec, problem: Problem) -> Objective:
    """The full training loss of a problem."""
    return Objective(
        problem.model,
        problem.loss,
        problem.train,
        chunk_size=spec.problem.chunk_size or 1024,
        # The model trains as it is; curvature is that of the function it stands for.
        mode="eval",
        method=spec.problem.product_method,
    )


def _unpacked(checkpoint: Checkpoint, device: Any = "cpu") -> dict[str, Any]:
    tensors = {name: tensor.to(device) for name, tensor in checkpoint.tensors.items()}
    return unpack_state(tensors, checkpoint.state)
