"""Which part of each parameter a process holds, and which numbers of it stand in its vector.

A shard is a box of its parameter: a range along each dimension. A parameter that is no shard is a
box that all processes hold. Of a box that several hold alike each has a stretch in its vector, so
that every number of theta is in one process's vector.

Example:
    >>> from types import SimpleNamespace
    >>> columns = SimpleNamespace(dim=1, is_shard=lambda: True)  # torch's Shard(1)
    >>> places = [((0, 2),), ((1, 2),)]  # of two processes, along one dimension of a mesh
    >>> cut = Boxes.of((2, 4), (columns,), places)
    >>> list(cut.segments(0)), list(cut.segments(1))
    ([(0, 2), (4, 6)], [(2, 4), (6, 8)])
    >>> list(Boxes.of((4,), None, places).segments(1))
    [(2, 4)]
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

Place = tuple[tuple[int, int], ...]
"""Where a process stands along each dimension of a mesh, and how many there are."""


Box = tuple[tuple[int, int], ...]
"""A part of a tensor: (begin, end) along each dimension."""


class Held(NamedTuple):
    """What a process holds of a parameter.

    Attributes:
        box: the part of it.
        number, holders: how many processes hold the same one, and which of them this is.
    """

    box: Box
    number: int
    holders: int

    @property
    def owned(self) -> tuple[int, int]:
        """Which numbers of the box, in their order, are in the process's vector: (begin, end)."""
        size = _size(self.box)
        each = math.ceil(size / self.holders)
        return min(self.number * each, size), min((self.number + 1) * each, size)


@dataclass(frozen=True)
class Boxes:
    """What the processes hold of one parameter.

    Attributes:
        shape: of the parameter.
        placements: of its shards; None where it is a plain tensor.
        held: by each process.
    """

    shape: tuple[int, ...]
    placements: tuple[Any, ...] | None
    held: tuple[Held, ...]

    @classmethod
    def of(
        cls, shape: tuple[int, ...], placements: tuple[Any, ...] | None, places: Sequence[Place]
    ) -> Boxes:
        """Those of processes at these places of a mesh."""
        boxes = [_box(shape, placements or (), place) for place in places]
        holders, before = Counter(boxes), Counter[Box]()
        held = []
        for box in boxes:
            held.append(Held(box, before[box], holders[box]))
            before[box] += 1
        return cls(shape, placements, tuple(held))

    @property
    def numel(self) -> int:
        """How many numbers the parameter has."""
        return math.prod(self.shape)

    @property
    def shared(self) -> bool:
        """Whether several processes hold the same box."""
        return any(each.holders > 1 and _size(each.box) for each in self.held)

    def segments(self, rank: int, offset: int = 0) -> Iterator[tuple[int, int]]:
        """Where a process's numbers stand in the flattened parameter, from an offset on."""
        begin, end = self.held[rank].owned
        at = 0
        for start, length in _runs(self.shape, self.held[rank].box):
            first, last = max(begin - at, 0), min(end - at, length)
            if first < last:
                yield offset + start + first, offset + start + last
            at += length
            if at >= end:
                return


def _box(shape: tuple[int, ...], placements: Sequence[Any], place: Place) -> Box:
    """What a process holds, as torch divides: into pieces of one length, the last ones shorter."""
    box = [(0, size) for size in shape]
    for placement, (at, ranks) in zip(placements, place, strict=False):
        if placement.is_shard():
            dim = placement.dim % len(shape)
            begin, end = box[dim]
            each = math.ceil((end - begin) / ranks)
            box[dim] = (min(begin + at * each, end), min(begin + (at + 1) * each, end))
    return tuple(box)


def _size(box: Box) -> int:
    return math.prod(end - begin for begin, end in box)


def _runs(shape: tuple[int, ...], box: Box) -> Iterator[tuple[int, int]]:
    """The numbers of a box in the flattened tensor, in their order: stretches (begin, length)."""
    if not _size(box):
        return
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    cut = [dim for dim, size in enumerate(shape) if box[dim] != (0, size)]
    # From the last dimension that is cut on, numbers stand together.
    last = cut[-1] if cut else 0
    length = _size(box[last:])
    inner = box[last][0] * strides[last] if box else 0
    for outer in itertools.product(*(range(*box[dim]) for dim in range(last))):
        begin = sum(index * stride for index, stride in zip(outer, strides, strict=False))
        yield begin + inner, length
