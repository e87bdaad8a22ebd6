"""Run some code in a process of its own that can take little more memory than it has."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import resource, sys
from pathlib import Path
{setup}
PATH = Path(sys.argv[1])
pages = int(Path("/proc/self/statm").read_text().split()[0])
most = pages * resource.getpagesize() + {extra} * 2**20
resource.setrlimit(resource.RLIMIT_AS, (most, most))
try:
    {code}
except Exception as error:
    print(type(error).__name__, error)
"""


def in_bounded_memory(code: str, path: Path, setup: str = "", extra: int = 300) -> str:
    """What a line of code says that is called with `PATH`; its error where it raises one.

    Args:
        setup: what is done before memory is bounded: imports.
        extra: megabytes that it may take beyond what the imports took.
    """
    if not Path("/proc/self/statm").exists():
        pytest.skip("memory is bounded on Linux alone")
    program = PROGRAM.format(setup=setup or code.split(";")[0], code=code, extra=extra)
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
