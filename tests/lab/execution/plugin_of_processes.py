"""A probe that kills its process at a step, where the environment says so; for a test."""

import os
import signal
import time
from pathlib import Path

from thalweg.registry import register


@register.probe("mortal", columns=["mortal"])
def mortal(state):
    told = os.environ.get("KILL_AT")
    if told is not None:
        rank, step, file = told.split(",")
        if rank == os.environ.get("RANK") and int(step) == state.step:
            Path(file).write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
    return {"mortal": 0.0}
