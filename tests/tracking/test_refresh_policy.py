from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thalweg.tracking.refresh_policy import SECOND_STEP, SMALLEST_SUBSET, RefreshPolicy, one_of_few

ERRORS = st.floats(0, 10)


def after(policy: RefreshPolicy, sampling: float, bias: float = 0.0, rounds: int = 1) -> int:
    """The subset after some full periods in which every step had these errors."""
    for _ in range(rounds):
        while not policy.due(0.0):
            policy.record(sampling, bias)
        policy.plan()
    return policy.subset


def test_the_subset_grows_where_errors_are_above_the_target() -> None:
    policy = RefreshPolicy(5000, 0.01)
    before = policy.subset
    assert after(policy, 0.03) > before


def test_the_subset_shrinks_where_errors_are_far_below_the_target() -> None:
    policy = RefreshPolicy(5000, 0.01)
    before = policy.subset
    assert after(policy, 0.0001) < before


def test_the_subset_settles_where_its_error_is_half_the_target() -> None:
    policy = RefreshPolicy(5000, 0.01)
    # An error that falls as the root of the subset, as that of a mean does.
    for _ in range(12):
        while not policy.due(0.0):
            policy.record(0.1 * policy.sampling_factor, 0.0)
        policy.plan()
    assert 0.1 * policy.sampling_factor == pytest.approx(0.005, rel=0.1)


def test_the_period_shortens_where_the_bias_exceeds_the_target_early() -> None:
    policy = RefreshPolicy(5000, 0.01, period=40)
    for step in range(40):
        policy.record(0.004, 0.001 * step)
    policy.plan()
    assert policy.period <= 11


def test_the_period_grows_while_nothing_speaks_against_it() -> None:
    policy = RefreshPolicy(5000, 0.01)
    before = policy.period
    for _ in range(3):
        after(policy, 0.004)
    assert policy.period > before


@settings(max_examples=100, deadline=None)
@given(
    num_samples=st.integers(8, 10**6),
    target=st.floats(1e-6, 1),
    steps=st.lists(st.tuples(ERRORS, ERRORS, st.booleans()), min_size=1, max_size=60),
)
def test_bounds_hold_whatever_the_errors_are(
    num_samples: int, target: float, steps: list[tuple[float, float, bool]]
) -> None:
    policy = RefreshPolicy(num_samples, target)
    for sampling, bias, renew in [(0.0, 0.0, True), *steps]:
        policy.record(sampling, bias)
        before = policy.subset
        if renew or policy.due(0.0):
            policy.plan()
            assert policy.history == []
            assert policy.subset <= max(3 * before, SMALLEST_SUBSET) + 1
        assert 2 <= policy.subset <= max(2, num_samples // 2 + 1)
        assert policy.subset % 2 == 0
        assert policy.subset >= min(SMALLEST_SUBSET, num_samples // 2) - 1
        assert policy.period >= 1


@settings(max_examples=20, deadline=None)
@given(steps=st.lists(st.tuples(ERRORS, ERRORS), min_size=1, max_size=50))
def test_a_policy_restored_from_json_decides_alike(steps: list[tuple[float, float]]) -> None:
    first = RefreshPolicy(1000, 0.02)
    for sampling, bias in steps:
        first.record(sampling, bias)
    second = RefreshPolicy(1000, 0.02)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert first == second
    first.plan()
    second.plan()
    assert first == second


def test_a_step_beyond_the_target_is_due_at_once_and_so_is_one_that_is_not_a_number() -> None:
    policy = RefreshPolicy(5000, 0.01)
    policy.record(0.001, 0.001)
    assert [policy.due(error) for error in (0.0, 0.01, 0.011, float("nan"))] == [
        *(False, False, True, True)
    ]


def test_a_second_step_is_asked_for_where_one_leaves_much_of_the_target() -> None:
    policy = RefreshPolicy(5000, 0.01)
    assert not policy.wants_second_step(SECOND_STEP * 0.01)
    assert policy.wants_second_step(1.01 * SECOND_STEP * 0.01)


def test_subset_sizes_are_few_even_and_not_smaller_than_asked_for() -> None:
    sizes = {asked: one_of_few(asked, 2000) for asked in range(2, 1002, 2)}
    assert len({size for asked, size in sizes.items() if asked >= 32}) <= 22
    assert all(asked <= size <= 1000 and size % 2 == 0 for asked, size in sizes.items())
    assert all(size <= 1.25 * asked for asked, size in sizes.items())
    assert one_of_few(4, 9) == 4
