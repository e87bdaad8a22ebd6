"""Experiments: the spec, one run step by step, many runs, what they leave on disk.

from thalweg import lab

lab.reproduce("main", problem="digits")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from thalweg.errors import require_extra

if TYPE_CHECKING:
    from thalweg.lab.config import load_spec as load_spec
    from thalweg.lab.store.folders import load as load
    from thalweg.lab.study import reproduce as reproduce
    from thalweg.lab.study import run_study as run_study

require_extra("lab", "pydantic", "tomli_w", "rich", "pyarrow", "pandas", "safetensors", "scipy")

_HOME = {
    "load": "thalweg.lab.store.folders",
    "load_spec": "thalweg.lab.config",
    "reproduce": "thalweg.lab.study",
    "run_study": "thalweg.lab.study",
}

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name == "run":
        name = "run_study"
    if name not in _HOME:
        raise AttributeError(f"module 'thalweg.lab' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
