"""A plugin whose probe says each step that a run takes, in the run's own `log.txt`.

A step that is taken again after a fault is said again: so many more lines, so many steps lost.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from thalweg.measure.probes import probe
from thalweg.measure.step_state import StepState


@probe("steps_taken", ["steps_taken"])
def steps_taken(state: StepState) -> Mapping[str, float]:
    """The step itself; standard output of a run's process is its log."""
    os.write(1, f"step taken {state.step}\n".encode())
    return {"steps_taken": float(state.step)}
