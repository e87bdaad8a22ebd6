from __future__ import annotations

import math

import pytest

from thalweg.tracking.damping import INITIAL, LEAST, MOST, Damping


@pytest.mark.parametrize(
    ("ratio", "value"), [(0.0, INITIAL), (0.6, 0.3), (5.0, MOST), (math.inf, MOST)]
)
def test_it_begins_with_half_the_ratio_within_its_range(ratio: float, value: float) -> None:
    damping = Damping()
    damping.begin(ratio)
    assert damping.value == value


@pytest.mark.parametrize("share", [0.03, 0.2, 0.7])
def test_it_comes_to_the_share_that_each_renewal_shows(share: float) -> None:
    damping = Damping()
    for _ in range(30):
        # The errors of bias and sampling are orthogonal.
        damping.learn(checked=math.hypot(0.01 * share, 0.004), sampling=0.004, moved=0.01)
    assert damping.value == pytest.approx(share, rel=1e-6)


def test_it_stays_in_its_range_whatever_is_shown() -> None:
    damping = Damping()
    for _ in range(60):
        damping.learn(checked=1.0, sampling=0.0, moved=0.01)
    assert damping.value == pytest.approx(MOST)
    for _ in range(60):
        damping.learn(checked=0.001, sampling=0.01, moved=0.01)
    assert damping.value == pytest.approx(LEAST)


def test_a_step_that_moved_nothing_teaches_nothing() -> None:
    damping = Damping()
    damping.learn(checked=0.5, sampling=0.0, moved=0.0)
    assert damping.value == INITIAL
