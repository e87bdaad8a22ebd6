"""Where words go: results to standard output, everything for people to standard error.

A file may hold anything: what would control the terminal is written out.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any

from thalweg.errors import without_controls


def out(text: str, end: str = "\n") -> None:
    """A result."""
    sys.stdout.write(without_controls(text) + end)


def out_json(value: Any) -> None:
    """A result as strict JSON; NaN and infinity, which JSON lacks, as text."""
    from thalweg.lab.store.durable import to_json

    out(to_json(value), end="")


def err(text: str) -> None:
    """A line for people, where somebody still reads."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(without_controls(text) + "\n")
