from __future__ import annotations

import math

import pytest
import torch

from thalweg.tracking.bulk_edge import (
    DROP,
    MOST_GUARDS,
    WIDE,
    BulkEdge,
    from_above,
    guards_wanted,
    reach,
)

SPECTRUM = [10.0, 8.0, 7.9, 7.0, 4.0, 1.0]


@pytest.mark.parametrize(
    ("k", "present", "wanted"),
    [
        (1, 0, 3),  # 4.0 is the first below 6
        (1, 5, 3),  # and below 4.8, so two of five are dropped
        (2, 0, 2),  # 4.0 is below 4.8
        (2, 3, 3),  # but not below 3.84: a guard that is there stays
        (4, 0, 0),
        (4, 1, 1),
        (5, 0, 0),
        (6, 0, 0),  # nothing below
    ],
)
def test_the_fewest_guards_with_which_the_gap_is_wide(k: int, present: int, wanted: int) -> None:
    values = torch.tensor(SPECTRUM)
    found = guards_wanted(values, k, present)
    # Said again: the first that is small enough, by a stricter rule for dropping one.
    allowed = [
        guards
        for guards in range(len(SPECTRUM) - k)
        if SPECTRUM[k + guards] <= (WIDE if guards >= present else DROP * WIDE) * SPECTRUM[k - 1]
    ]
    assert found == min([*allowed, len(SPECTRUM) - k, MOST_GUARDS])
    assert found == wanted


def test_there_are_no_more_guards_than_the_most() -> None:
    assert guards_wanted(torch.ones(40), 3, 0) == MOST_GUARDS


@pytest.mark.parametrize("lower", [0.0, 0.1, -0.1])
@pytest.mark.parametrize("tilt", [0.03, 0.3])
def test_an_eigenvalue_from_its_ritz_value(lower: float, tilt: float) -> None:
    # A vector in the plane of two eigenvectors, of the eigenvalues 2 and `lower`.
    values, vector = torch.tensor([2.0, lower]), torch.tensor([math.cos(tilt), math.sin(tilt)])
    ritz = float(vector @ (values * vector))
    residual = float((values * vector - ritz * vector).norm())
    assert ritz < from_above(ritz, residual)
    # Exact where the lower one is zero, else off by a part of what was missing.
    assert abs(from_above(ritz, residual) - 2.0) < 0.11 * (2.0 - ritz) + 1e-6


def test_what_lies_above_zero_by_less_than_its_residual_reaches_no_further() -> None:
    assert from_above(0.1, 0.5) == pytest.approx(0.6)
    assert from_above(-0.2, 0.5) == -0.2


@pytest.mark.parametrize(
    ("residuals", "reached"),
    [
        ((0, 0, 0.1, 0.1, 0), 3.0),  # all guards are eigenvectors: the look
        ((0, 0, 0.1, 0.1, 0.6), 3.12),  # and 0.36 / 3 above it
        ((0, 0, 1.5, 2.5, 0.6), 7.5),  # the second guard is a packet: 5 + 2.5
        ((0, 0, 2.5, 0.1, 0.6), 8.0),  # the first one is: at most lambda_2
    ],
)
def test_a_guard_of_a_large_residual_reaches_up(
    residuals: tuple[float, ...], reached: float
) -> None:
    values = torch.tensor([9.0, 8.0, 7.0, 5.0, 3.0])
    assert reach(values, torch.tensor(residuals), k=2, size=4) == pytest.approx(reached)


def test_without_guards_the_look_alone_tells_how_far_it_reaches() -> None:
    values, residuals = torch.tensor([9.0, 8.0, 2.0]), torch.tensor([5.0, 5.0, 1.0])
    assert reach(values, residuals, k=2, size=2) == 2.5


def test_between_looks_the_ratio_follows_its_trend() -> None:
    edge = BulkEdge()
    assert edge.ratio(8.0) == 0.0
    edge.see(torch.tensor([9.0, 8.0, 2.0]), k=2, size=2, vector=None)
    assert edge.ratio(8.0) == 0.25
    edge.pass_by(10)
    edge.see(torch.tensor([9.0, 8.0, 3.0]), k=2, size=2, vector=None)
    edge.pass_by(4)
    # 3 / 8, and 4 tenths of the change by 1 / 8.
    assert edge.ratio(8.0) == pytest.approx(0.375 + 0.05)
    # Of lambda_k as it is now.
    assert edge.ratio(6.0) == pytest.approx(0.5 + 0.05)
    # A ratio that falls is taken as it was.
    edge.see(torch.tensor([9.0, 8.0, 2.0]), k=2, size=2, vector=None)
    edge.pass_by(100)
    assert edge.ratio(8.0) == 0.25
    # What is below zero has no part in the first k.
    edge.look(-5.0, None)
    assert edge.ratio(8.0) == 0.0


def test_only_what_an_earlier_version_did_not_note_may_lack() -> None:
    edge = BulkEdge()
    edge.see(torch.tensor([9.0, 8.0, 2.0]), k=2, size=2, vector=None)
    saved = edge.state_dict()
    earlier = {name: saved[name] for name in saved if name not in ("reached", "left")}
    other = BulkEdge()
    other.load_state_dict(earlier)
    assert other.ratio(8.0) == edge.ratio(8.0)
    assert (math.isnan(other.reached), other.left) == (True, 0.0)
    del earlier["age"]
    with pytest.raises(KeyError):
        other.load_state_dict(earlier)


def test_it_narrows_once_until_it_has_been_looked_at() -> None:
    edge = BulkEdge()
    for value in (2.0, 4.0):
        edge.see(torch.tensor([9.0, 8.0, value]), k=2, size=2, vector=None)
        edge.pass_by(10)
    edge.look(5.0, None)
    assert not edge.narrowed(8.0, 0.8)
    # A trend of 0.0125 an update: 15 of them from 0.625.
    edge.pass_by(13)
    assert not edge.narrowed(8.0, 0.8)
    edge.pass_by(2)
    assert edge.narrowed(8.0, 0.8)
    assert not edge.narrowed(0.0, 0.8)


def test_a_block_of_another_size_begins_a_new_trend() -> None:
    edge = BulkEdge()
    edge.see(torch.tensor([9.0, 8.0, 2.0]), k=2, size=2, vector=None)
    edge.pass_by(10)
    edge.see(torch.tensor([9.0, 8.0, 7.0, 6.0]), k=2, size=3, vector=None)
    edge.pass_by(10)
    assert edge.ratio(8.0) == 0.75


def test_without_a_complement_there_is_nothing_to_look_at() -> None:
    edge = BulkEdge()
    edge.see(torch.tensor([9.0, 8.0]), k=2, size=2, vector=None)
    assert math.isnan(edge.value)
    assert edge.ratio(8.0) == 0.0
    assert edge.start(torch.eye(2), torch.Generator().manual_seed(0)) is None


def test_looks_come_to_the_next_eigenvector() -> None:
    values = torch.tensor([9.0, 8.0, 3.0, *torch.linspace(2, -2, 30).tolist()]).double()
    vectors = torch.linalg.qr(torch.randn(33, 33, generator=torch.Generator().manual_seed(1)))[0]
    matrix = (vectors.double() * values) @ vectors.double().T
    block = vectors[:, :2].T.double().contiguous()
    edge, generator, seen = BulkEdge(), torch.Generator().manual_seed(2), []
    for _ in range(12):
        look = edge.start(block, generator)
        assert look is not None
        assert float((block @ look).norm()) < 1e-6
        assert float(look.norm()) == pytest.approx(1)
        image = matrix @ look
        outside = image - block.T @ (block @ image)
        seen.append(float(look @ image))
        edge.see(torch.tensor([9.0, 8.0, seen[-1]]), 2, 2, outside / outside.norm())
    # Each from below, as a Rayleigh quotient in the complement is.
    assert max(seen) <= 3.0 + 1e-6
    assert seen[-1] > 2.9


def test_a_restored_one_looks_the_same_way() -> None:
    edge, other = BulkEdge(), BulkEdge()
    edge.see(torch.tensor([9.0, 8.0, 2.0]), 2, 2, torch.eye(5)[4])
    edge.pass_by(3)
    other.load_state_dict(edge.state_dict())
    looks = [e.start(torch.eye(2, 5), torch.Generator().manual_seed(3)) for e in (edge, other)]
    assert looks[0] is not None
    assert looks[1] is not None
    assert torch.equal(looks[0], looks[1])
    assert edge.ratio(8.0) == other.ratio(8.0)
