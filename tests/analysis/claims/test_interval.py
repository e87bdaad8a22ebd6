from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from thalweg.analysis.claims.interval import seed_interval
from thalweg.errors import InvalidInput


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.99])
def test_the_interval_of_two_and_of_three_values_is_the_closed_form(level: float) -> None:
    # Quantiles of Student's distribution with one and two degrees of freedom.
    quantiles = {2: math.tan(math.pi * level / 2), 3: level * math.sqrt(2 / (1 - level**2))}
    for values in ([1.0, 2.0], [1.0, 2.0, 6.0]):
        deviation = np.std(values, ddof=1) / math.sqrt(len(values))
        reach = quantiles[len(values)] * deviation
        interval = seed_interval(values, level)
        assert interval.high - interval.mean == pytest.approx(reach, rel=1e-12)
        assert interval.mean - interval.low == pytest.approx(reach, rel=1e-12)


def test_interval_is_scipys() -> None:
    values = np.random.default_rng(0).normal(3, 2, size=7)
    interval = seed_interval(values.tolist())
    low, high = stats.t.interval(0.95, 6, loc=values.mean(), scale=stats.sem(values))
    assert (interval.low, interval.high) == pytest.approx((low, high), rel=1e-9)


def test_equal_values_have_an_interval_of_no_width() -> None:
    interval = seed_interval([2.0, 2.0, 2.0])
    assert (interval.mean, interval.low, interval.high) == (2.0, 2.0, 2.0)


def test_one_value_has_a_mean_and_no_interval() -> None:
    interval = seed_interval([0.3])
    assert interval.mean == 0.3
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)


def test_no_value_is_refused() -> None:
    with pytest.raises(InvalidInput, match="at least one number"):
        seed_interval([])


@pytest.mark.parametrize("level", [0.0, 1.0, 95.0])
def test_an_impossible_level_is_refused(level: float) -> None:
    with pytest.raises(InvalidInput):
        seed_interval([1.0, 2.0], level)


def test_coverage_is_what_the_level_says() -> None:
    stream = np.random.default_rng(1)
    draws = stream.normal(0.0, 1.0, size=(4000, 3))
    hits = [low <= 0 <= high for low, high in map(_ends, draws.tolist())]
    assert np.mean(hits) == pytest.approx(0.95, abs=0.012)


def _ends(values: list[float]) -> tuple[float, float]:
    interval = seed_interval(values)
    return interval.low, interval.high
