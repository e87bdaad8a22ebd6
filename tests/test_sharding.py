"""A part of a vector says that it is one, and is refused where it would be taken for the whole."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from thalweg.errors import InvalidInput
from thalweg.linalg import _drawn, _signs, coordinates, gram, length
from thalweg.sharding import (
    LONG,
    ShardedVector,
    Sharding,
    packed,
    plain,
    sharding_of,
    unpacked,
)

P = 3 * LONG
SHARDING = Sharding(None, [[(0, 10), (100, P)], [(10, 100)]], rank=1)
OTHER = Sharding(None, [[(0, 102)], [(102, P)]], rank=1)


def rows(sharding: Sharding = SHARDING) -> ShardedVector:
    whole = torch.arange(2 * P, dtype=torch.float64, device="cpu").reshape(2, P)
    return sharding.part_of(whole)


def test_a_part_is_that_of_its_segments() -> None:
    whole = torch.arange(P, device="cpu")
    first = Sharding(None, SHARDING.segments, rank=0).part_of(whole)
    assert first.own.tolist() == [*range(10), *range(100, P)]
    assert SHARDING.part_of(whole).own.tolist() == list(range(10, 100))
    assert SHARDING.num_parameters == P
    assert SHARDING.lengths == (P - 90, 90)


KEEPS: dict[str, Callable[[Any], Tensor]] = {
    "sum": lambda v: v + v,
    "multiple": lambda v: 2 * v / 3,
    "plain factor of each row": lambda v: torch.ones(2, 1).double() * v,
    "columns": lambda v: v.T,
    "row": lambda v: v[1],
    "rows": lambda v: v[:1],
    "block": lambda v: torch.cat([v, torch.stack([v[0], v[1]])]),
    "dtype": lambda v: v.float(),
    "kind": lambda v: v.to(torch.float32),
    "like": lambda v: torch.zeros_like(v),
    "in place": lambda v: v.clone().mul_(2).add_(v),
    "chosen": lambda v: torch.where(v > 3, v, 0.0),
    "copy": copy.deepcopy,
}


@pytest.mark.parametrize("operation", KEEPS)
def test_operations_number_by_number_keep_the_kind(operation: str) -> None:
    given = rows()
    found = KEEPS[operation](given)
    assert isinstance(found, ShardedVector)
    assert sharding_of(found) is SHARDING
    assert torch.equal(plain(found), KEEPS[operation](plain(given)))


def test_a_plain_tensor_of_the_same_kind_stays_plain() -> None:
    assert type(torch.ones(2).to(rows())) is Tensor


WRONG: dict[str, Callable[[Any], Any]] = {
    "product": lambda v: v @ v.T,
    "sum": lambda v: v.sum(),
    "mean": lambda v: v.mean(dim=1),
    "norm": lambda v: v.norm(),
    "vector_norm": lambda v: torch.linalg.vector_norm(v),
    "dot": lambda v: torch.dot(v[0], v[1]),
    "einsum": lambda v: torch.einsum("kp,bp->kb", v, v),
    "largest": lambda v: v.abs().max(),
    "qr": lambda v: torch.linalg.qr(v.T),
    "equal": lambda v: torch.equal(v, v),
    "any": lambda v: v.any(),
    "truth": lambda v: bool((v > 0).all()),
    "list": lambda v: v.tolist(),
    "one number": lambda v: v[0, 3],
    "new tensor": lambda v: v.new_zeros(3),
    "plain summand": lambda v: v + torch.ones(2, 90).double(),
    "plain target": lambda v: torch.zeros(2, 90).double().copy_(v),
    "part of another division": lambda v: v + rows(OTHER),
    "product with plain rows": lambda v: gram(v, torch.ones(2, 90).double()),
    "plain coordinates": lambda v: coordinates(torch.ones(2, 90).double(), v[0]),
    "pickle": pickle.dumps,
}


@pytest.mark.parametrize("operation", WRONG)
def test_what_would_be_of_one_part_alone_is_refused(operation: str) -> None:
    with pytest.raises(InvalidInput, match=r"ShardedVector"):
        WRONG[operation](rows())


def test_the_length_of_a_part_is_that_of_the_whole() -> None:
    assert length(rows()) == length(rows().T, 0) == P
    assert length(torch.ones(5)) == 5


def test_a_state_comes_back_from_plain_tensors() -> None:
    state = {"rows": rows(), "more": [rows()[0], 3, torch.ones(2)], "none": None}
    saved = packed(state)
    assert type(saved["rows"]["own"]) is Tensor
    back = unpacked(saved, SHARDING)
    assert isinstance(back["rows"], ShardedVector)
    assert torch.equal(plain(back["rows"]), plain(rows()))
    assert torch.equal(plain(back["more"][0]), plain(rows()[0]))
    assert back["more"][1:2] == [3]
    assert back["none"] is None


@pytest.mark.parametrize(
    ("sharding", "said"),
    [
        (Sharding(None, SHARDING.segments, rank=0), "rank 1 of 2"),
        (Sharding(None, [[(0, 64)], [(64, 128)], [(128, P)]], rank=1), "that of rank 1 of 3"),
        (None, "one process"),
    ],
)
def test_the_state_of_another_part_is_refused(sharding: Sharding | None, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        unpacked(packed({"rows": rows()}), sharding)


@pytest.mark.parametrize("size", [5, 16, 33, 64, 77, 96, 101])
def test_numbers_drawn_in_blocks_are_those_of_one_draw(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("thalweg.linalg.DRAWN_AT_ONCE", 32)
    kind = {"dtype": torch.float64, "device": "cpu"}
    once = torch.randn(size, generator=torch.Generator().manual_seed(3), **kind)
    cut = size // 3
    for rank, part in enumerate((once[:cut], once[cut:])):
        sharding = Sharding(None, [[(0, cut)], [(cut, size)]], rank)
        drawn = torch.cat([*_drawn(torch.Generator().manual_seed(3), sharding)])
        assert torch.equal(drawn, part)


def test_columns_of_any_sign_get_those_of_householder_qr() -> None:
    generator = torch.Generator().manual_seed(0)
    for m in (1, 4, 9):
        block = torch.randn(40, m, generator=generator, dtype=torch.float64, device="cpu")
        basis, _ = torch.linalg.qr(block)
        turned = basis * (torch.arange(m, device="cpu") % 2 * 2 - 1)
        torch.testing.assert_close(turned * _signs(turned[:m]), basis)
