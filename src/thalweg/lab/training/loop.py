"""One run: the trunk of a seed, or a branch from a last checkpoint; step by step, resumable.

What happens in a step is in `step.py`. Everything that the next step depends on is in the
checkpoint, so a run that was killed continues bit for bit as if nothing had happened.

Processes that share a run make the same steps, each with its part of the samples in every sum over
them. The first of them writes and looks at clock and requests; the others read along.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.optim import Optimizer

from thalweg.errors import Diverged, IntegrityError, Interrupted, InvalidInput
from thalweg.lab.config import TRUNK, Spec
from thalweg.lab.identity import bound_of, run_hash
from thalweg.lab.sharing import note_maker
from thalweg.lab.store import RunFolder, StudyFolder
from thalweg.lab.store.belonging import Mark
from thalweg.lab.store.checkpoint import (
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    read_mark,
    verify_checkpoint,
)
from thalweg.lab.store.metrics import MetricsWriter
from thalweg.lab.training.building import Setup, solved_subspace, stream_seed
from thalweg.lab.training.recording import StatusWriter
from thalweg.lab.training.run_state import (
    RunState,
    at_branch_point,
    found_for_branches,
    restored_state,
    save_basis,
    save_state,
)
from thalweg.lab.training.step import make_step, state_at, tell_batch
from thalweg.linalg import bits_of
from thalweg.loss.reduce import group_of_all, reduction_of
from thalweg.tracking.source import SubspaceSource

_ONE_FOLDER = "all processes of a run need to see one run folder, on a disk that they share"
_ONE_MACHINE = (
    "the processes of the run have parted in their rounding: machines of one kind, and as many"
    " threads in each, compute alike"
)


class Unwritten:
    """In the place of the table, in a process that another one writes for."""

    rows, last_step = 0, None

    def __enter__(self) -> Unwritten:
        return self

    def __exit__(self, *_: object) -> None: ...
    def truncate(self, step: int) -> None: ...
    def log(self, row: Mapping[str, Any], step: int) -> None: ...
    def flush(self) -> None: ...
    def compact(self) -> None: ...


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

    Attributes:
        hash: of the run, which all its files carry.
        keep: how many checkpoints stay.
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
        self.reduction = reduction_of(group_of_all())
        self.writes = self.reduction.rank == 0
        folder = study.run(seed, branch)
        self.folder: RunFolder = folder if self.writes else folder.followed()
        self.seed = seed
        self.branch = branch
        self.should_stop = should_stop
        folder = self.folder
        self._data = fingerprint or folder.data_fingerprint
        self.hash = run_hash(self._of_all, seed, branch, self._data)
        self.state = RunState(spec, seed, branch, device, folder.phase_request, folder.log)
        if fingerprint and fingerprint != self.setup.problem.fingerprint():
            raise IntegrityError(f"{folder.path}: the data has changed since the run began")
        self.progression, self.recorder = self.state.progression, self.state.recorder
        self.status = StatusWriter(folder, self.progression, self.recorder, self.hash)
        self.keep = spec.checkpoint.keep
        self._saved_at = time.monotonic()

    @property
    def step(self) -> int:
        """Updates made since the trunk's start."""
        return self.progression.position.step

    @property
    def setup(self) -> Setup:
        """The problem with its model, the full training loss, and k."""
        return self.state.setup

    @property
    def source(self) -> SubspaceSource:
        """What gives S_k."""
        return self.state.source

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer of the current phase."""
        return self.state.optimizer

    def execute(self) -> None:
        """Train from the last checkpoint, or from the start, to the end; write everything.

        Raises:
            Diverged: a loss or product became NaN or infinite; what was measured is kept.
            Interrupted: `should_stop` said so; a checkpoint was saved.
            IntegrityError: a checkpoint is damaged.
            InvalidInput: another process is at work on this run; the trunk is not finished.
        """
        with self.folder.locked(), self.sitting() as metrics:
            self._note_lockstep_before()
            self._loop(metrics)

    @contextmanager
    def sitting(self, start: Path | None = None) -> Iterator[MetricsWriter | Unwritten]:
        """Go to where the run goes on; its table, while it is trained. At the end say how it ended.

        The run's folder must be locked.

        Args:
            start: a checkpoint of the run that passes its check; default: the newest that does.

        Raises:
            Diverged: what happened within is divergence; the step is in the message.
            IntegrityError, InvalidInput: see `execute`.
        """
        try:
            begun_with = self._begin(start)
            self.reduction.require_same("checkpoint", lambda: str(self.step), _ONE_FOLDER)
            with self._table() as metrics:
                metrics.truncate(self.step)
                if self.writes:
                    self._check_measured(metrics, begun_with)
                self.status.write("running")
                try:
                    yield metrics
                except Diverged:
                    self._record_divergence(metrics)
                    raise
                metrics.compact()
        except Diverged as error:
            message = f"at step {self.step}: {error}"
            self.status.write("diverged", message)
            self.folder.log(f"diverged {message}")
            raise Diverged(message) from error
        self.status.write("done", rows=metrics.rows)
        self.folder.log(f"done at step {self.step}")

    def _table(self) -> MetricsWriter | Unwritten:
        if not self.writes:
            return Unwritten()
        return MetricsWriter(self.folder.metrics, self.recorder.columns, self.hash)

    def _check_measured(self, metrics: MetricsWriter | Unwritten, mark: Mark) -> None:
        """Check that what was measured before the checkpoint that the run goes on from is there."""
        if mark.rows is not None and mark.rows != metrics.rows:
            raise IntegrityError(
                f"{self.folder.metrics}: {metrics.rows} of the {mark.rows} rows are there that were"
                f" measured before step {self.step}; restore the others from a copy, or:"
                f" thalweg check {self.study.path} --repair"
            )

    def _loop(self, metrics: MetricsWriter | Unwritten) -> None:
        while self.progression.step_remains():
            # Built at the phase's first step, whether or not a checkpoint falls there.
            _ = self.state.optimizer
            self._checkpoint_if_due(metrics)
            row = make_step(self.state)
            if row is not None:
                metrics.log(row, row["step"])
            self.status.running()
        self.checkpoint(metrics, ends=True)
        self.last_row(metrics)

    def _note_lockstep_before(self) -> None:
        """Say where this run, or the one it starts from, was made in lockstep: see `note_maker`."""
        if self.state.lockstep is not None:
            self.folder.log(
                "goes on by itself after a lockstep, with a tracker begun anew: numbers may differ"
                " in the last digits from those of the lockstep"
            )
        if self.writes:
            note_maker(self.study, self._of_all, self.seed, self.branch, "")

    def note_lockstep(self, label: str) -> None:
        """Write down that the run is made in a lockstep: see `note_maker`."""
        note_maker(self.study, self._of_all, self.seed, self.branch, label)

    def last_row(self, metrics: MetricsWriter | Unwritten) -> None:
        """Measure everything where the run has ended."""
        row = self.recorder.row(state_at(self.state), everything=True)
        if row is not None:
            metrics.log(row, row["step"])

    def _record_divergence(self, metrics: MetricsWriter | Unwritten) -> None:
        """A last row whose loss is NaN, so that the table itself says what happened."""
        is_new = metrics.last_step is None or metrics.last_step < self.step
        if "loss" in self.recorder.probes and is_new:
            rate = self.progression.learning_rate
            row = {"step": self.step, "learning_rate": rate, "loss": float("nan")}
            metrics.log(row, self.step)
        metrics.flush()

    # Where a run begins.

    def _begin(self, start: Path | None) -> Mark:
        """Go to where the run begins or goes on; return what the checkpoint there says."""
        torch.manual_seed(stream_seed("training", self.seed))
        newest = start or latest_checkpoint(self.folder.checkpoints, self.hash)
        mark = Mark() if newest is None else read_mark(newest)
        if newest is not None:
            if start is None and newest != list_checkpoints(self.folder.checkpoints)[-1]:
                self.folder.log(f"newer checkpoints than {newest.name} are damaged: passed over")
            device = self.setup.objective.device
            self.state.load_state_dict(restored_state(load_checkpoint(newest), device))
            self.status.continue_from(self.folder.status())
            self.folder.log(f"resumed at step {self.step}")
        else:
            if self.branch != TRUNK:
                self._start_branch()
            self.folder.log(f"started at step {self.step}")
        return mark

    def _start_branch(self) -> None:
        """Start where the run before ends: its parameters, random state, momentum and S_k."""
        before = self.spec.before(self.branch)
        start = self.study.run(self.seed, before or TRUNK)
        known = list_checkpoints(start.checkpoints)
        if not known:
            raise InvalidInput(f"{start.path}: it has not been begun; run it first")
        self._check_start(start, known[-1], before or TRUNK)
        given = restored_state(load_checkpoint(known[-1]), self.setup.objective.device)
        if not given["progression"]["finished"]:
            raise InvalidInput(f"{start.path}: it is not finished; run it first")
        self.progression.begin_at(given["progression"]["step"])
        self.state.load_model_and_random(given)
        if self.spec.asks_for_branch_point(self.progression.phase):
            theta, found = self.setup.objective.theta(), given.get("found", {})
            tell_batch(self.state)
            self.state.branch_point = at_branch_point(found, self.spec, self.source, theta)
        phase = self.spec.phases[-1] if before is None else self.spec.branch_phase(before)
        self.state.carry_optimizer_state(given["optimizer"], phase.optimizer)

    def _check_start(self, start: RunFolder, newest: Path, branch: str) -> None:
        """Check the checkpoint that this run starts from; an older one would not be the end."""
        of_start = run_hash(self._of_all, self.seed, branch, self._data)
        try:
            verify_checkpoint(newest, of_start)
        except IntegrityError as error:
            study = self.study.path
            raise IntegrityError(
                f"{error}; to run {start.path} again from its newest good state:"
                f" thalweg check {study} --repair, then thalweg resume {study}"
            ) from error

    # Checkpoints.

    def _decided(self, *asked: bool) -> list[bool]:
        """What any of the processes of the run asks for: all do the same then."""
        own = torch.tensor(asked, dtype=torch.float64, device="cpu")
        return (self.reduction.sum(own) > 0).tolist()

    def _checkpoint_if_due(self, metrics: MetricsWriter | Unwritten) -> None:
        stops, by_time, self.progression.ends_by_hand = self._decided(
            self.should_stop(),
            self.writes and self.saves_by_time,
            self.writes and self.progression.is_requested(),
        )
        if stops:
            self.checkpoint(metrics)
            self.interrupt()
        if by_time or self.saves_by_step:
            self.checkpoint(metrics, regular=self.saves_by_step)

    @property
    def saves_by_time(self) -> bool:
        """Whether so many seconds have passed since the last checkpoint."""
        every = self.spec.checkpoint.every_seconds
        return time.monotonic() - self._saved_at >= every > 0

    @property
    def saves_by_step(self) -> bool:
        """Whether a checkpoint falls on this step."""
        is_first = self.step == self.progression.position.start
        return not is_first and self.step % self.spec.checkpoint.every_steps == 0

    def interrupt(self) -> NoReturn:
        """End the sitting, once a checkpoint is saved.

        Raises:
            Interrupted: always.
        """
        self.status.write("interrupted", "stopped on request; thalweg resume continues it")
        self.folder.log(f"interrupted at step {self.step}")
        raise Interrupted(f"stopped on request at step {self.step}")

    def checkpoint(
        self, metrics: MetricsWriter | Unwritten, *, regular: bool = False, ends: bool = False
    ) -> None:
        """Save all that the next step depends on.

        Args:
            regular: it falls on a step at which one is always saved.
            ends: the run has come to its end.
        """
        # Rows first: a checkpoint must never be ahead of what was measured before it.
        metrics.flush()
        state = self.state.state_dict()
        if ends:
            found = found_for_branches(self._of_all, self.branch, self.setup, self.seed)
            state["found"] = found
        theta = self.setup.objective.theta
        self.reduction.require_same("theta", lambda: bits_of(theta()), _ONE_MACHINE)
        if self.writes:
            save_state(
                self.folder.checkpoints,
                self.step,
                state,
                keep=self.keep,
                permanent=ends,
                mark=Mark(self.hash, metrics.rows, ends, bound_of(self.progression.phases[-1])),
            )
            self.progression.forget_request()
        if self.spec.checkpoint.save_bases and (regular or ends):
            # Solved, not tracked: the tracker is left alone, so that runs with and without saved
            # bases make the same steps. Not at checkpoints by time, whose steps are chance.
            subspace = solved_subspace(self.spec, self.setup, self.seed, theta())
            if self.writes:
                save_basis(self.folder.bases, self.step, subspace)
        self._saved_at = time.monotonic()
