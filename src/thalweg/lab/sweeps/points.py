"""What is a sweep made of? Points: the settings that differ, and the study that has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thalweg.lab.store import StudyFolder

Setting = int | float | str | bool | list[Any] | dict[str, Any]
"""A value of a key: what TOML can say."""


@dataclass(frozen=True)
class Point:
    """One combination of settings, and the study that is run with them.

    Attributes:
        settings: by key as the user wrote it, such as `{"lr": 0.1, "batch_size": "all"}`.
        study: its folder, which may not exist yet; its seeds are in there.
    """

    settings: Mapping[str, Setting] = field(hash=False)
    study: StudyFolder


@dataclass(frozen=True)
class Sweep:
    """A sweep's folder and its points.

    Attributes:
        path: the folder, with `sweep.json`, the report and its figures.
        name: what the user calls it.
        seeds: of every point.
        points: in the order of the grid, the last key varying fastest.
    """

    path: Path
    name: str
    seeds: tuple[int, ...]
    points: tuple[Point, ...]

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys that a point can set, in the order in which they first occur."""
        return tuple(dict.fromkeys(key for point in self.points for key in point.settings))

    def values(self, key: str) -> tuple[Setting, ...]:
        """The values of a key over all points, numbers by size, others as they occur."""
        # By what they are written as: true is not 1, and lists are in no set.
        found = {
            repr(point.settings[key]): point.settings[key]
            for point in self.points
            if key in point.settings
        }
        return tuple(sorted(found.values(), key=_place))


def _place(value: Setting) -> tuple[bool, float]:
    """Numbers by size, everything else after them in its order."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return False, float(value)
    return True, 0.0
