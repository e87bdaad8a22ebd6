"""Attributes of objects, as they were: what an evaluation of ours writes into them is put back.

Example:
    >>> import torch
    >>> model = torch.nn.Linear(3, 2)
    >>> model.passes, model.seen = 0, {"train": [0.5]}
    >>> before = Attributes([model])
    >>> model.passes += 1
    >>> model.seen["train"].append(0.25)
    >>> before.put_back()
    >>> model.passes, model.seen
    (0, {'train': [0.5]})
"""

from __future__ import annotations

import operator
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

CONTAINERS = (dict, OrderedDict, defaultdict, list, set, deque)
OWN_OF_A_MODULE = frozenset(vars(nn.Module()))
REGISTERED = ("_parameters", "_buffers", "_modules")
MOST_LOOKED_INTO = 1000
"""Entries of a container in which further containers are looked for: more are data."""


class Attributes:
    """What objects hold, as it was: their attributes, and what is in lists, dicts and sets.

    Args:
        holders: modules, or other objects whose attributes are in `vars`.
    """

    def __init__(self, holders: Sequence[Any]) -> None:
        self._held = [(vars(holder), dict(vars(holder))) for holder in holders]
        found: dict[int, Any] = {}
        for attributes, _ in self._held:
            for name, value in attributes.items():
                if name not in OWN_OF_A_MODULE or name in REGISTERED:
                    _find_containers(value, found)
        self._contents = [(value, value.copy()) for value in found.values()]

    def changed(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """The attributes of each object that are other objects than before."""
        return [
            (now, {n: v for n, v in now.items() if n not in before or before[n] is not v})
            for now, before in self._held
            if not _same_objects(now, before)
        ]

    def put_back(self) -> None:
        """All as it was."""
        for now, before in self._held:
            if not _same_objects(now, before):
                now.clear()
                now.update(before)
        for now, before in self._contents:
            if not _same_objects(now, before):
                _refill(now, before)


def _find_containers(value: Any, found: dict[int, Any]) -> None:
    """Note a container, and those within it, by identity."""
    if type(value) not in CONTAINERS or id(value) in found:
        return
    found[id(value)] = value
    if len(value) <= MOST_LOOKED_INTO:
        for inside in _entries(value):
            _find_containers(inside, found)


def _entries(container: Any) -> Iterator[Any]:
    yield from container.values() if isinstance(container, Mapping) else container


def _same_objects(first: Any, second: Any) -> bool:
    if len(first) != len(second):
        return False
    if isinstance(first, set):
        return first == second
    if isinstance(first, Mapping):
        return all(map(operator.is_, first, second)) and all(
            map(operator.is_, first.values(), second.values())
        )
    return all(map(operator.is_, first, second))


def _refill(container: Any, contents: Any) -> None:
    container.clear()
    (container.update if hasattr(container, "update") else container.extend)(contents)
