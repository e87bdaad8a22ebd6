"""What is written down at a step: the rows of the table, from the probes that are due.

A probe is due at every n-th step, and at the run's first and last one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from thalweg import registry
from thalweg.errors import ThalwegError
from thalweg.lab.store.metrics import Column
from thalweg.measure.probes import Probe
from thalweg.measure.step_state import StepState

SHOWN = ("loss", "alignment_gradient", "sharpness")
"""Columns whose last value the status shows."""


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

    def row(self, moment: StepState, *, everything: bool = False) -> dict[str, Any] | None:
        """The row of this step; None where no probe is due.

        Args:
            everything: ask all probes, due or not.
        """
        due = [
            probe
            for name, probe in self.probes.items()
            if everything or moment.step % self.every[name] == 0
        ]
        if not due:
            return None
        if any(probe.needs_gradient for probe in due):
            _ = moment.gradient
        moment.steps_before = self._steps_since_row
        moment.gradients_before = self._gradients_since_row
        row: dict[str, Any] = {"step": moment.step, "learning_rate": moment.learning_rate}
        for probe in due:
            row.update(_measured(probe, moment))
        self.last.update({name: row[name] for name in SHOWN if row.get(name) is not None})
        return row

    def count_cost(self, moment: StepState, *, recorded: bool) -> None:
        """Add what the subspace cost at this step to the next row; a row reports its own step."""
        if recorded:
            self._steps_since_row, self._gradients_since_row = 0, 0.0
            return
        self._steps_since_row += 1
        if moment.used_subspace:
            self._gradients_since_row += moment.source.report.gradients

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


def _measured(probe: Probe, moment: StepState) -> Mapping[str, Any]:
    """The probe's values; a probe that fails is named."""
    try:
        return probe.measure(moment)
    except ThalwegError:
        raise
    except Exception as error:
        error.add_note(f"probe {probe.name!r} failed at step {moment.step}")
        raise
