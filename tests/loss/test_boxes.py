"""Processes hold of a parameter what torch gives them, and each number stands in one vector."""

from __future__ import annotations

import itertools
import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard

from thalweg.loss.boxes import Boxes


@settings(deadline=None)
@given(
    shape=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    mesh=st.lists(st.integers(1, 3), min_size=1, max_size=2),
    draw=st.data(),
)
def test_boxes_are_torchs_chunks_and_each_number_has_one_owner(
    shape: list[int], mesh: list[int], draw: st.DataObject
) -> None:
    kinds = [Replicate(), *map(Shard, range(len(shape)))]
    placements = tuple(draw.draw(st.sampled_from(kinds)) for _ in mesh)
    places = [
        tuple(zip(place, mesh, strict=True)) for place in itertools.product(*map(range, mesh))
    ]
    boxes = Boxes.of(tuple(shape), placements, places)
    numbers = torch.arange(math.prod(shape)).reshape(shape)
    for place, held in zip(places, boxes.held, strict=True):
        expected = numbers
        for placement, (at, ranks) in zip(placements, place, strict=True):
            if isinstance(placement, Shard):
                parts = expected.chunk(ranks, dim=placement.dim)
                empty = expected.narrow(placement.dim, 0, 0)
                expected = parts[at] if at < len(parts) else empty
        inside = tuple(slice(*ends) for ends in held.box)
        assert torch.equal(numbers[inside], expected)
    owned = [
        numbers.flatten()[begin:end].tolist()
        for rank in range(len(places))
        for begin, end in boxes.segments(rank)
    ]
    assert sorted(itertools.chain(*owned)) == numbers.flatten().tolist()
