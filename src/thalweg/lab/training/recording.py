"""What does a run write down? Rows from the probes that are due, and where it stands.

A probe is due at every n-th step, and at the run's first and last one. The status is written at
most once a second while the run continues.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from thalweg import registry
from thalweg.errors import ThalwegError
from thalweg.lab.store import RunFolder
from thalweg.lab.store.metrics import Column
from thalweg.lab.store.status import State, Status
from thalweg.lab.training.building import Setup
from thalweg.lab.training.progression import Progression
from thalweg.measure.probes import Probe
from thalweg.measure.step_state import StepState

SHOWN = ("loss", "alignment_gradient", "sharpness")
"""Columns whose last value the status shows."""
STATUS_SECONDS = 1.0


class Recorder:
    """Asks the probes, and counts what the subspace cost between two rows.

    Args:
        every: the probes' names, and every how many steps each is due.
    """

    def __init__(self, every: Mapping[str, int]) -> None:
        self.every = dict(every)
        self.probes: dict[str, Probe] = {name: registry.probes[name] for name in every}
        self.last: dict[str, float] = {}
        # Renewals fall between measured steps too: their cost belongs to the next row.
        self._steps_since_row = 0
        self._gradients_since_row = 0.0

    @property
    def columns(self) -> list[Column]:
        """All columns of the run's table."""
        return [
            Column("step", "integer"),
            Column("learning_rate"),
            *(
                Column(column, "vector" if column in probe.vectors else "float")
                for probe in self.probes.values()
                for column in probe.columns
            ),
        ]

    def row(self, now: StepState, *, everything: bool = False) -> dict[str, Any] | None:
        """The row of this step, once it has been made; None where no probe is due.

        Args:
            everything: ask all probes, due or not.
        """
        due = self.due(now.step, everything=everything)
        if not due:
            self.pass_by()
            if now.subspace_is_known:
                self.spend(now.source.report.subspace_cost)
            return None
        if any(probe.needs_gradient for probe in due):
            _ = now.gradient
        now.steps_before = self._steps_since_row
        now.gradients_before = self._gradients_since_row
        row: dict[str, Any] = {"step": now.step, "learning_rate": now.learning_rate}
        for probe in due:
            row.update(_measured(probe, now))
        self.last.update({name: row[name] for name in SHOWN if row.get(name) is not None})
        # A row reports the cost of its own step itself.
        self._steps_since_row, self._gradients_since_row = 0, 0.0
        return row

    def due(self, step: int, *, everything: bool = False) -> list[Probe]:
        """The probes that are asked at a step.

        Args:
            everything: all of them.
        """
        return [
            probe
            for name, probe in self.probes.items()
            if everything or step % self.every[name] == 0
        ]

    def pass_by(self) -> None:
        """A step was made at which no probe is due."""
        self._steps_since_row += 1

    def spend(self, gradients: float) -> None:
        """The subspace has cost so many gradients of the full loss, which no row has told."""
        self._gradients_since_row += gradients

    def state_dict(self) -> dict[str, Any]:
        """The counts and the last values."""
        return {
            "steps": self._steps_since_row,
            "gradients": self._gradients_since_row,
            "last": dict(self.last),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self._steps_since_row = state["steps"]
        self._gradients_since_row = state["gradients"]
        self.last = dict(state["last"])


def _measured(probe: Probe, now: StepState) -> Mapping[str, Any]:
    """The probe's values; a probe that fails is named."""
    try:
        return probe.measure(now)
    except ThalwegError:
        raise
    except Exception as error:
        error.add_note(f"probe {probe.name!r} failed at step {now.step}")
        raise


def evaluate_test(setup: Setup, theta: Tensor) -> tuple[float, float | None]:
    """Loss and accuracy (None without classes) on the held-out data at theta (P,).

    The model is left as it was, its training modes included.
    """
    problem, objective = setup.problem, setup.objective
    assert problem.test is not None
    model, (inputs, targets) = problem.model, problem.test
    now = objective.theta()
    modes = {module: module.training for module in model.modules()}
    objective.layout.write(model, theta)
    model.eval()
    size = objective.chunk_size or len(inputs)
    loss = correct = 0.0
    with torch.no_grad():
        for x, y in zip(inputs.split(size), targets.split(size), strict=True):
            output = model(x)
            loss += float(problem.loss(output, y)) * len(x)
            if problem.num_classes is not None:
                correct += float(problem.accuracy(output, y)) * len(x)
    for module, training in modes.items():
        module.training = training
    objective.layout.write(model, now)
    accuracy = None if problem.num_classes is None else correct / len(inputs)
    return loss / len(inputs), accuracy


class StatusWriter:
    """Writes the status of a run, and counts the seconds of all its sittings.

    Args:
        run: hash of the run.
    """

    def __init__(
        self, folder: RunFolder, progression: Progression, recorder: Recorder, run: str
    ) -> None:
        self._folder = folder
        self._run = run
        self._progression = progression
        self._recorder = recorder
        self._begun = time.monotonic()
        self._written = 0.0
        self._earlier_seconds = 0.0

    def continue_from(self, earlier: Status | None) -> None:
        """Count on from an earlier sitting."""
        self._earlier_seconds = earlier.seconds if earlier else 0.0

    def running(self) -> None:
        """Say that the run continues, if it has not been said within the last second."""
        if time.monotonic() - self._written >= STATUS_SECONDS:
            self.write("running")

    def write(self, state: State, message: str | None = None, rows: int | None = None) -> None:
        """Replace the status; without a message, it is what is to be said of the phases.

        Args:
            rows: how many rows of metrics a run that is done has.
        """
        self._written = time.monotonic()
        last = self._recorder.last
        position = self._progression.position
        self._folder.write_status(
            Status(
                state=state,
                step=position.step,
                end_step=self._progression.end_step,
                seconds=self._earlier_seconds + time.monotonic() - self._begun,
                loss=last.get("loss"),
                alignment=last.get("alignment_gradient"),
                sharpness=last.get("sharpness"),
                message=position.message if message is None else message,
                run_hash=self._run,
                rows=rows,
            )
        )
