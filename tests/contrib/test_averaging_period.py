from __future__ import annotations

import math

import pytest
import torch

from thalweg.contrib.averaging_period import AveragingPeriod, ConstantPeriod, QuadraticRule, Rounds
from thalweg.errors import InvalidInput


def lengths(
    schedule: AveragingPeriod, total: int | None, rates: list[float], steps: int
) -> list[int]:
    """Steps between averages, and those of a last round that got none."""
    rounds = Rounds(schedule, total)
    found, since = [], 0
    for step in range(steps):
        rounds.begin_step(rates[min(step, len(rates) - 1)])
        since += 1
        if rounds.end_step():
            found.append(since)
            since = 0
    return [*found, since] if since else found


@pytest.mark.parametrize(
    ("lr", "expected"),
    [
        # alpha / lr = 2.1875, 4.375, 8.75, 17.5, 35: squared and rounded down by hand.
        (0.008, 4),
        (0.004, 19),
        (0.002, 76),
        (0.001, 306),
        (0.0005, 1225),
    ],
)
def test_the_quadratic_rule_is_that_of_the_paper(lr: float, expected: int) -> None:
    assert QuadraticRule(alpha=0.0175, minimum=4).period(lr, 0) == expected


@pytest.mark.parametrize(("power", "expected"), [(1.0, 8), (2.0, 64), (3.0, 512)])
def test_other_powers_are_those_that_the_paper_compares_with(power: float, expected: int) -> None:
    assert QuadraticRule(alpha=1.0, minimum=2, power=power).period(0.125, 0) == expected


@pytest.mark.parametrize(
    ("alpha", "lr", "power", "expected"),
    [
        # Quotients of decimals that are whole numbers, or just below one after rounding.
        (0.3, 0.1, 2.0, 9),
        (0.7, 0.1, 2.0, 49),
        (0.3, 0.1, 3.0, 27),
        (0.6, 0.2, 1.0, 3),
        (0.3, float(torch.tensor(0.1)), 2.0, 9),
        (2.999, 1.0, 2.0, 8),
        (2.99999, 1.0, 2.0, 8),
        # Large periods are rounded down as before.
        (math.sqrt(1_000_000.99), 1.0, 2.0, 1_000_000),
    ],
)
def test_rounding_does_not_decide_over_a_period(
    alpha: float, lr: float, power: float, expected: int
) -> None:
    assert QuadraticRule(alpha, 1, power).period(lr, 0) == expected


def test_a_round_is_as_long_as_the_learning_rate_of_its_first_step_says() -> None:
    # (0.5 / lr)^2 at steps 0, 1, 2, ...: 1, 4, 4, 4, 4, 4, 16, 16, ...: rounds at 0, 1, 5, 9.
    rates = [0.5, 0.25, 0.25, 0.25, 0.25, 0.25, 0.125]
    rule = QuadraticRule(alpha=0.5, minimum=1)
    assert lengths(rule, 40, rates, 40) == [1, 4, 4, 16, 15]


def test_the_last_round_ends_with_the_training() -> None:
    assert lengths(ConstantPeriod(8), 20, [0.1], 20) == [8, 8, 4]
    assert lengths(QuadraticRule(1.0, 2), 20, [0.25], 20) == [16, 4]
    assert lengths(QuadraticRule(1.0, 2), 20, [0.0], 20) == [20]
    assert lengths(QuadraticRule(1.0, 2), 20, [1e-300], 20) == [20]
    # Without an end, it is for the caller to average once more.
    assert lengths(ConstantPeriod(8), None, [0.1], 20) == [8, 8, 4]


def test_beyond_its_end_a_training_is_synchronous() -> None:
    assert lengths(ConstantPeriod(8), 10, [0.1], 13) == [8, 2, 1, 1, 1]


def test_rounds_of_a_warm_up_are_of_the_minimum() -> None:
    # A round that begins before step 5 has 3 steps: at 0 and at 3; (0.4 / 0.1)^2 = 16 after that.
    rule = QuadraticRule(0.4, 3, warmup_steps=5)
    assert lengths(rule, 30, [0.001, 0.001, 0.001, 0.001, 0.1], 30) == [3, 3, 16, 8]


def test_counters_can_be_restored_in_the_middle_of_a_round() -> None:
    rule = QuadraticRule(alpha=1.0, minimum=2)
    whole = Rounds(rule, 50)
    for _ in range(5):
        whole.begin_step(0.25)
        assert not whole.end_step()
    restored = Rounds(rule, 50)
    restored.load_state_dict(whole.state_dict())
    assert restored.state_dict() == {"steps": 5, "period": 16, "done": 5}
    # A new learning rate does not change a round that has begun.
    ends = []
    for _ in range(11):
        restored.begin_step(1.0)
        ends.append(restored.end_step())
    assert ends == [False] * 10 + [True]


def test_what_cannot_be_used_is_refused() -> None:
    with pytest.raises(InvalidInput, match="steps: got 0"):
        ConstantPeriod(0)
    with pytest.raises(InvalidInput, match="minimum: got 0"):
        QuadraticRule(0.1, 0)
    for name in ("alpha", "power"):
        for value in (0.0, -1.0, float("inf"), float("nan")):
            with pytest.raises(InvalidInput, match=f"{name}: got"):
                QuadraticRule(**{"alpha": 0.1, "minimum": 2, name: value})
    with pytest.raises(InvalidInput, match="warmup_steps: got -1"):
        QuadraticRule(0.1, 2, warmup_steps=-1)
    with pytest.raises(InvalidInput, match="a growing round needs an end"):
        Rounds(QuadraticRule(0.1, 2))
    with pytest.raises(InvalidInput, match="total_steps: got -1"):
        Rounds(ConstantPeriod(2), -1)
