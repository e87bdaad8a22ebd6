from __future__ import annotations

import math

import pytest

from thalweg.measure.effective_learning_rate import effective_learning_rate


def test_the_rate_is_a_ratio_of_sums_not_a_mean_of_ratios() -> None:
    assert effective_learning_rate([1.0, 1.0, 1.0], [1.0, 1.0, 0.001]) == pytest.approx(3 / 2.001)


def test_steps_without_both_terms_are_left_out() -> None:
    numerators = [0.2, None, 5.0, math.inf, 0.2]
    denominators = [2.0, 7.0, math.nan, 1.0, 2.0]
    assert effective_learning_rate(numerators, denominators) == pytest.approx(0.1)


@pytest.mark.parametrize("denominators", [[], [0.0], [math.nan], [-1.0]])
def test_the_rate_is_unknown_without_a_positive_sum_of_denominators(
    denominators: list[float],
) -> None:
    assert math.isnan(effective_learning_rate([1.0] * len(denominators), denominators))


def test_a_part_that_climbs_has_a_negative_rate() -> None:
    assert effective_learning_rate([-1.0, 0.5], [4.0, 1.0]) == pytest.approx(-0.1)
