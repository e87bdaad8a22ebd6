"""Former name of what is in `measure`, `optim`, `contrib`, `tracking`; for one version."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

_ROOMS = ("measure", "optim", "contrib", "tracking")


def __getattr__(name: str) -> Any:
    new_name = {"Moment": "StepState"}.get(name, name)
    for room in _ROOMS:
        module = importlib.import_module(f"thalweg.{room}")
        if new_name in module.__all__:
            hint = f"thalweg.dynamics.{name} has moved: from thalweg.{room} import {new_name}"
            warnings.warn(hint, DeprecationWarning, stacklevel=2)
            return getattr(module, new_name)
    raise AttributeError(f"module 'thalweg.dynamics' has no attribute {name!r}")
