"""One run: the trunk of a seed, or a branch from a last checkpoint; step by step, resumable.

The natural way through a step at theta_t:

    batch (seed, t) -> gradient -> optimizer proposes -> split on S_k(theta_t) -> probes -> row t

Everything that the next step depends on is in the checkpoint, so a run that was killed goes on bit
for bit as if nothing had happened.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from thalweg.contrib.simulated_workers import WORKERS
from thalweg.errors import Diverged, IntegrityError, Interrupted, InvalidInput
from thalweg.lab.asking import needs_branch_point
from thalweg.lab.config import TRUNK, Spec
from thalweg.lab.config.optimizers import OptimizerSettings
from thalweg.lab.store import RunFolder, StudyFolder
from thalweg.lab.store.checkpoint import Checkpoint, latest_checkpoint, load_checkpoint
from thalweg.lab.store.metrics import MetricsWriter
from thalweg.lab.training.branch_points import at_branch_point, found_for_branches
from thalweg.lab.training.building import (
    build_setup,
    can_carry_state,
    make_optimizer,
    make_source,
    solve,
    solved_subspace,
)
from thalweg.lab.training.local_workers import samples_of
from thalweg.lab.training.minibatches import minibatch
from thalweg.lab.training.progression import Progression
from thalweg.lab.training.random_streams import random_state, restore_random_state, stream_seed
from thalweg.lab.training.recording import Recorder
from thalweg.lab.training.saving import (
    branch_point_state,
    restored_branch_point,
    restored_state,
    save_basis,
    save_state,
)
from thalweg.lab.training.saying import StatusWriter
from thalweg.lab.training.step import evaluate_test, train_one_step
from thalweg.measure.step_state import BranchPoint, StepState
from thalweg.optim.split import SplitUpdate
from thalweg.tracking.batch_subspace import BatchSubspace
from thalweg.tracking.gradient_subspaces import GradientSubspace, UpdateSubspace
from thalweg.tracking.optimizer_metric import OptimizerMetricSource
from thalweg.tracking.source import SubspaceSource


class Run:
    """One run of a study in its folder; `execute` takes it to its end, from wherever it stands.

    Args:
        spec: the resolved spec of the study.
        study: its folder.
        seed: which seed.
        branch: name of the branch, or "trunk".
        device: where to compute, such as "cpu" or "cuda:1".
        fingerprint: that of the data which the run began with; empty: not checked.
        should_stop: asked at every step; True saves a checkpoint and raises `Interrupted`.

    Raises:
        InvalidInput: the problem cannot be built.
        IntegrityError: a file is damaged, or the data is not that of the run's beginning.
    """

    def __init__(
        self,
        spec: Spec,
        study: StudyFolder,
        seed: int,
        branch: str,
        *,
        device: str = "cpu",
        fingerprint: str = "",
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self._of_all = spec
        self.spec = spec = spec.of_branch(branch)
        self.study = study
        self.folder: RunFolder = study.run(seed, branch)
        self.seed = seed
        self.branch = branch
        self.should_stop = should_stop
        self.setup = build_setup(spec, seed, device)
        if fingerprint and fingerprint != self.setup.problem.fingerprint():
            raise IntegrityError(f"{self.folder.path}: the data has changed since the run began")
        self.progression = Progression(
            spec.phases if branch == TRUNK else (spec.branch_phase(branch),),
            self.setup.problem.num_samples,
            self.folder.phase_request,
            self.folder.log,
        )
        self.recorder = Recorder(spec.probes)
        self.source: SubspaceSource = make_source(spec, self.setup, seed)
        self.branch_point: BranchPoint | None = None
        self._optimizer: Optimizer | None = None
        self._phase_of_optimizer = -1
        self.status = StatusWriter(self.folder, self.progression, self.recorder)
        self._saved_at = time.monotonic()

    @property
    def step(self) -> int:
        """Updates made since the trunk's start."""
        return self.progression.position.step

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer of the current phase, built when the phase begins.

        The same kind of optimizer goes on with its momentum, under the new phase's settings.
        """
        number = self.progression.position.phase
        if self._optimizer is None or self._phase_of_optimizer != number:
            before = self._optimizer
            phase_before = self.progression.phases[self._phase_of_optimizer]
            point = self.branch_point
            self._optimizer = make_optimizer(
                self.spec,
                self.progression.phase,
                self.setup,
                self.seed,
                self.source,
                None if point is None else point.subspace,
            )
            self._phase_of_optimizer = number
            if before is not None:
                self._carry_state(before.state_dict(), phase_before.optimizer)
        return self._optimizer

    @property
    def _split_source(self) -> SubspaceSource | None:
        """What the split alone follows, in the optimizer's metric or cheaply; None elsewhere."""
        source = getattr(self.optimizer, "source", None)
        own = (OptimizerMetricSource, UpdateSubspace, GradientSubspace)
        return source if isinstance(source, own) else None

    def _carry_state(self, state: dict[str, Any], settings: OptimizerSettings) -> None:
        if can_carry_state(settings, self.progression.phase.optimizer):
            groups = self.optimizer.state_dict()["param_groups"]
            # Workers begin together, at the mean of those before, each with the first one's state.
            one = {key: value for key, value in state.items() if key != WORKERS}
            self.optimizer.load_state_dict({**one, "param_groups": groups})
        elif state["state"]:
            self.folder.log("another kind of optimizer: it begins without the state of the last")

    def execute(self) -> None:
        """Train from the last checkpoint, or from the start, to the end; write everything.

        Raises:
            Diverged: a loss or product became NaN or infinite; what was measured is kept.
            Interrupted: `should_stop` said so; a checkpoint was saved.
            IntegrityError: a checkpoint is damaged.
            InvalidInput: another process is at work on this run; the trunk is not finished.
        """
        with self.folder.locked():
            try:
                self._train()
            except Diverged as error:
                self.status.write("diverged", f"at step {self.step}: {error}")
                self.folder.log(f"diverged at step {self.step}: {error}")
                raise
            self.status.write("done")
            self.folder.log(f"done at step {self.step}")

    def _train(self) -> None:
        self._begin()
        with MetricsWriter(self.folder.metrics, self.recorder.columns) as metrics:
            metrics.truncate(self.step)
            self.status.write("running")
            try:
                self._loop(metrics)
            except Diverged:
                self._record_divergence(metrics)
                raise
            metrics.compact()

    def _begin(self) -> None:
        torch.manual_seed(stream_seed("training", self.seed))
        newest = latest_checkpoint(self.folder.checkpoints)
        if newest is not None:
            self._restore(load_checkpoint(newest))
            self.status.continue_from(self.folder.status())
            self.folder.log(f"resumed at step {self.step}")
        else:
            if self.branch != TRUNK:
                self._start_branch()
            self.folder.log(f"started at step {self.step}")

    def _loop(self, metrics: MetricsWriter) -> None:
        while self.progression.step_remains():
            # Built at the phase's first step, whether or not a checkpoint falls there.
            optimizer = self.optimizer
            self._checkpoint_if_due(metrics)
            moment = self._moment()
            if self.progression.ends(moment):
                continue
            phase = self.progression.phase
            if isinstance(optimizer, SplitUpdate):
                optimizer.dominant, optimizer.bulk = self.progression.split_factors
            buffers = train_one_step(moment, self.setup, optimizer, phase, self.seed)
            row = self.recorder.row(moment, everything=self.step == self._first_step)
            if row is not None:
                metrics.append(row)
            self.recorder.count_cost(moment, recorded=row is not None)
            buffers.move_on()
            self.progression.position.step += 1
            self.status.running()
        self._checkpoint(metrics, ends=True)
        row = self.recorder.row(self._moment(), everything=True)
        if row is not None:
            metrics.append(row)

    @property
    def _first_step(self) -> int:
        return self.progression.position.start

    def _moment(self) -> StepState:
        theta = self.setup.objective.theta()
        if not bool(torch.isfinite(theta).all()):
            raise Diverged("a parameter is NaN or infinite")
        has_test = self.setup.problem.test is not None
        phase = self.progression.phase
        size = phase.batch_size if phase.noise is None else phase.noise.batch_size
        size = None if size in ("all", self.setup.problem.num_samples) else size
        self._tell_batch()
        return StepState(
            step=self.step,
            theta=theta,
            objective=self.setup.objective,
            source=self.source,
            learning_rate=self.progression.learning_rate,
            branch_point=self.branch_point,
            evaluate_test=partial(evaluate_test, self.setup) if has_test else None,
            solve=self._solve,
            optimizer=self.optimizer,
            batches=None if size is None else partial(self._batches, size),
            k=self.setup.k,
        )

    def _tell_batch(self) -> None:
        """The samples of the next step, for a subspace of their Hessian."""
        if isinstance(self.source, BatchSubspace):
            total = self.setup.problem.num_samples
            self.source.samples = samples_of(self.progression.phase, self.seed, self.step, 0, total)

    def _batches(self, size: int, count: int) -> list[Tensor]:
        """Mini-batches as the phase draws them, independent of each other and of those trained on.

        A function of seed and step alone.
        """
        total = self.setup.problem.num_samples
        seeds = (stream_seed("measured batches", self.seed, self.step, n) for n in range(count))
        return [minibatch(seed, 0, size, total) for seed in seeds]

    def _solve(self, theta: Tensor, k: int) -> Any:
        return solve(self.setup.objective, theta, k, self.spec.subspace.tolerance)

    def _record_divergence(self, metrics: MetricsWriter) -> None:
        """A last row whose loss is NaN, so that the table itself says what happened."""
        is_new = metrics.last_step is None or metrics.last_step < self.step
        if "loss" in self.recorder.probes and is_new:
            rate = self.progression.learning_rate
            metrics.append({"step": self.step, "learning_rate": rate, "loss": float("nan")})
        metrics.flush()

    # Branches.

    def _start_branch(self) -> None:
        before = self.spec.before(self.branch)
        start = self.study.run(self.seed, before or TRUNK)
        newest = latest_checkpoint(start.checkpoints)
        if newest is None:
            raise InvalidInput(f"{start.path}: it has not been begun; run it first")
        state = restored_state(load_checkpoint(newest), self.setup.objective.device)
        if not state["progression"]["finished"]:
            raise InvalidInput(f"{start.path}: it is not finished; run it first")
        self.progression.begin_at(state["progression"]["step"])
        self._restore_model_and_random(state)
        if needs_branch_point(self.spec, self.progression.phase):
            theta, found = self.setup.objective.theta(), state.get("found", {})
            self._tell_batch()
            self.branch_point = at_branch_point(found, self.spec, self.source, theta)
        phase = self.spec.phases[-1] if before is None else self.spec.branch_phase(before)
        self._carry_state(state["optimizer"], phase.optimizer)

    # Checkpoints.

    def _checkpoint_if_due(self, metrics: MetricsWriter) -> None:
        settings = self.spec.checkpoint
        if self.should_stop():
            self._checkpoint(metrics)
            self.status.write("interrupted", "stopped on request; thalweg resume goes on")
            self.folder.log(f"interrupted at step {self.step}")
            raise Interrupted(f"stopped on request at step {self.step}")
        by_time = time.monotonic() - self._saved_at >= settings.every_seconds > 0
        by_step = self.step > self._first_step and self.step % settings.every_steps == 0
        if by_time or by_step:
            self._checkpoint(metrics, regular=by_step)

    def _checkpoint(
        self, metrics: MetricsWriter, *, regular: bool = False, ends: bool = False
    ) -> None:
        # Rows first: a checkpoint must never be ahead of what was measured before it.
        metrics.flush()
        state = self._state()
        if ends:
            found = found_for_branches(self._of_all, self.branch, self.setup, self.seed)
            state["found"] = found
        save_state(
            self.folder.checkpoints,
            self.step,
            state,
            keep=self.spec.checkpoint.keep,
            permanent=ends,
        )
        self.progression.forget_request()
        if self.spec.checkpoint.save_bases and (regular or ends):
            # Solved, not tracked: the tracker is left alone, so that runs with and without saved
            # bases make the same steps. Not at checkpoints by time, whose steps are chance.
            theta = self.setup.objective.theta()
            subspace = solved_subspace(self.spec, self.setup, self.seed, theta)
            save_basis(self.folder.bases, self.step, subspace)
        self._saved_at = time.monotonic()

    def _state(self) -> dict[str, Any]:
        model = self.setup.problem.model
        return {
            "progression": self.progression.state_dict(),
            "parameters": {name: tensor.detach() for name, tensor in model.state_dict().items()},
            "optimizer": self.optimizer.state_dict(),
            "source": self.source.state_dict(),
            "split_source": self._split_source.state_dict() if self._split_source else {},
            "branch_point": branch_point_state(self.branch_point),
            "recorder": self.recorder.state_dict(),
            "random": random_state(self.setup.objective.device),
        }

    def _restore(self, checkpoint: Checkpoint) -> None:
        state = restored_state(checkpoint, self.setup.objective.device)
        self.progression.load_state_dict(state["progression"])
        self.branch_point = restored_branch_point(state["branch_point"])
        self.source.load_state_dict(state["source"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self._split_source is not None:
            self._split_source.load_state_dict(state["split_source"])
        self.recorder.load_state_dict(state["recorder"])
        self._restore_model_and_random(state)

    def _restore_model_and_random(self, state: dict[str, Any]) -> None:
        self.setup.problem.model.load_state_dict(state["parameters"])
        restore_random_state(state["random"], self.setup.objective.device)
