"""Experiments: the spec, one run step by step, many runs, what they leave on disk.

from thalweg import lab

lab.reproduce("main", problem="digits")
lab.run("my-spec.toml")
lab.run(lab.Study(problem=lab.Problem(...), phases=[lab.Phase(...)], branches={...}))
"""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

from thalweg.errors import require_extra

if TYPE_CHECKING:
    from thalweg.lab.config import load_spec as load_spec
    from thalweg.lab.in_python import Branch as Branch
    from thalweg.lab.in_python import Phase as Phase
    from thalweg.lab.in_python import Split as Split
    from thalweg.lab.in_python import Study as Study
    from thalweg.lab.store.frames import load as load
    from thalweg.lab.study import reproduce as reproduce
    from thalweg.lab.study import resume as resume
    from thalweg.lab.study import run as run
    from thalweg.lab.sweeps.axes import Range as Range
    from thalweg.lab.sweeps.running import sweep as sweep
    from thalweg.lab.sweeps.search import search as search
    from thalweg.lab.working import work as work
    from thalweg.problems.given import GivenProblem as Problem  # noqa: F401

require_extra("lab", "pydantic", "tomli_w", "rich", "pyarrow", "pandas", "safetensors", "scipy")

_HOME = {
    "Branch": "thalweg.lab.in_python:Branch",
    "Phase": "thalweg.lab.in_python:Phase",
    "Problem": "thalweg.problems.given:GivenProblem",
    "Split": "thalweg.lab.in_python:Split",
    "Study": "thalweg.lab.in_python:Study",
    "load": "thalweg.lab.store.frames:load",
    "load_spec": "thalweg.lab.config:load_spec",
    "reproduce": "thalweg.lab.study:reproduce",
    "resume": "thalweg.lab.study:resume",
    "Range": "thalweg.lab.sweeps.axes:Range",
    "run": "thalweg.lab.study:run",
    "search": "thalweg.lab.sweeps.search:search",
    "sweep": "thalweg.lab.sweeps.running:sweep",
    "work": "thalweg.lab.working:work",
}

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name == "run_study":
        hint = "thalweg.lab.run_study is called thalweg.lab.run now"
        warnings.warn(hint, DeprecationWarning, stacklevel=2)
        name = "run"
    if name not in _HOME:
        raise AttributeError(f"module 'thalweg.lab' has no attribute {name!r}")
    module, attribute = _HOME[name].split(":")
    return getattr(importlib.import_module(module), attribute)
