"""How does a person end the current phase of a running run?

By a file in the run's folder that the run looks for at every step. Each request has a name of its
own, which the run's checkpoint remembers: it is followed once, whatever is killed when.
"""

from __future__ import annotations

import secrets
from pathlib import Path

from thalweg.errors import InvalidInput
from thalweg.lab.inspection import open_run
from thalweg.lab.run_names import END_PHASE
from thalweg.lab.store import durable


def ask_to_end(name: str, root: Path | str = "runs") -> Path:
    """Ask the run that `STUDY/seed-N/BRANCH` names to end its current phase at the next step.

    Raises:
        InvalidInput: there is no such run, or it is not running.
    """
    run = open_run(name, root)
    status = run.status()
    if status is None or status.state != "running":
        state = "not begun" if status is None else status.state
        raise InvalidInput(f"{name}: it is {state}; only a running run can end its phase")
    request = run.path / END_PHASE
    durable.write_file(request, secrets.token_hex(8) + "\n")
    return request
