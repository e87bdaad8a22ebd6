"""Former home of what is in `thalweg.registry` and `thalweg.settings` now; for one version."""

from __future__ import annotations

import warnings

from thalweg.registry import Registry, datasets, load_plugin, losses, models
from thalweg.settings import Settings, SpecModel, bad_value

__all__ = [
    "Registry",
    "Settings",
    "SpecModel",
    "bad_value",
    "datasets",
    "load_plugin",
    "losses",
    "models",
]

warnings.warn(
    "thalweg.lab.registry has moved: from thalweg.registry import register,"
    " from thalweg.settings import Settings",
    DeprecationWarning,
    stacklevel=2,
)
