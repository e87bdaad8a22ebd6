"""The formulas against Monte Carlo on the data set itself, and against each other."""

from __future__ import annotations

import math

import numpy as np
import pytest

from thalweg.problems.quadratic import Quadratic
from thalweg.problems.quadratic_theory import (
    critical_learning_rate,
    critical_step_size,
    expected_after_step,
    expected_after_steps,
    expected_loss_change,
    stationary,
)

STEEP, FLAT, K, D = 2.0, 0.1, 4, 40
INPUTS = np.asarray(
    Quadratic(components=3000, dimension=D, dominant=K, steep=STEEP, flat=FLAT, offset_bulk=2.0)
    .build()
    .train_inputs
)
SPECTRUM, SLOPES = INPUTS[0, 0], INPUTS[:, 1]
TOP = SPECTRUM == STEEP
THETA = np.random.default_rng(1).standard_normal(D) * np.where(TOP, 0.7, 3.0)
PARTS = [(TOP, STEEP), (~TOP, FLAT)]


def squared(part: np.ndarray) -> float:
    """norm(Q g)^2 at THETA."""
    return float(np.sum((SPECTRUM * THETA)[part] ** 2))


def noise(part: np.ndarray) -> float:
    """E norm(Q n)^2 of batches of one sample, over all samples."""
    return float(np.mean(np.sum(SLOPES[:, part] ** 2, axis=1)))


def loss(theta: np.ndarray) -> np.ndarray:
    return np.sum(SPECTRUM * theta**2, axis=-1) / 2


@pytest.mark.parametrize("lr", [0.05, 0.6, 0.95])
@pytest.mark.parametrize(("part", "curvature"), PARTS, ids=["dominant", "bulk"])
def test_the_expected_gradient_after_a_step(part: np.ndarray, curvature: float, lr: float) -> None:
    """Averaged over every sample: exact, up to rounding."""
    after = SPECTRUM * (THETA - lr * (SPECTRUM * THETA - SLOPES))
    measured = float(np.mean(np.sum(after[:, part] ** 2, axis=1)))
    predicted = expected_after_step(lr, curvature, squared(part), noise(part))
    assert predicted == pytest.approx(measured, rel=1e-10)


@pytest.mark.parametrize("lr", [0.0, 0.3, 1 / STEEP, 2 / STEEP, 1.3])
def test_many_steps_are_one_step_many_times(lr: float) -> None:
    value = 3.0
    for steps in range(6):
        assert expected_after_steps(lr, STEEP, 3.0, 5.0, steps) == pytest.approx(value, rel=1e-12)
        value = expected_after_step(lr, STEEP, value, 5.0)


@pytest.mark.parametrize("lr", [0.05, 0.6, 0.95])
@pytest.mark.parametrize(("part", "curvature"), PARTS, ids=["dominant", "bulk"])
def test_the_expected_loss_change_of_a_step_along_one_part(
    part: np.ndarray, curvature: float, lr: float
) -> None:
    update = -lr * np.where(part, SPECTRUM * THETA - SLOPES, 0)
    measured = float(np.mean(loss(THETA + update) - loss(THETA)))
    predicted = expected_loss_change(lr, curvature, squared(part), noise(part))
    assert predicted == pytest.approx(measured, rel=1e-10)


@pytest.mark.parametrize(("part", "curvature"), PARTS, ids=["dominant", "bulk"])
def test_the_critical_learning_rate_changes_the_sign_of_the_loss_change(
    part: np.ndarray, curvature: float
) -> None:
    critical = critical_learning_rate(curvature, squared(part), noise(part))
    for factor, sign in ((0.9, -1), (1.1, 1)):
        update = -factor * critical * np.where(part, SPECTRUM * THETA - SLOPES, 0)
        assert sign * np.mean(loss(THETA + update) - loss(THETA)) > 0
    # Its definition for any model: 2 norm(Q g)^2 / E[(Q g_B)^T A (Q g_B)].
    steps = np.where(part, SPECTRUM * THETA - SLOPES, 0)
    energy = float(np.mean(np.sum(SPECTRUM * steps**2, axis=1)))
    assert critical == pytest.approx(2 * squared(part) / energy, rel=1e-10)


def test_between_the_two_rates_the_bulk_lowers_and_the_dominant_part_raises_the_loss() -> None:
    rates = [critical_learning_rate(h, squared(part), noise(part)) for part, h in PARTS]
    assert rates[0] < rates[1]
    between = math.sqrt(rates[0] * rates[1])
    dominant, bulk = (
        expected_loss_change(between, h, squared(part), noise(part)) for part, h in PARTS
    )
    assert dominant > 0 > bulk


def test_alignment_rises_above_the_critical_step_size_and_falls_below() -> None:
    numbers = [squared(TOP), squared(~TOP), noise(TOP), noise(~TOP)]
    critical = critical_step_size(STEEP, FLAT, *numbers)
    assert 0 < critical < 2 / STEEP
    for factor, sign in ((0.95, -1), (1.05, 1)):
        after = SPECTRUM * (THETA - factor * critical * (SPECTRUM * THETA - SLOPES))
        ratio = [np.mean(np.sum(after[:, part] ** 2, axis=1)) for part in (TOP, ~TOP)]
        before = squared(TOP) / squared(~TOP)
        assert sign * (ratio[0] / ratio[1] - before) > 0


def test_high_on_the_walls_alignment_falls_at_almost_every_stable_step() -> None:
    far = critical_step_size(STEEP, FLAT, 1e12, 1e12, noise(TOP), noise(~TOP))
    assert far == pytest.approx(2 / (STEEP + FLAT), rel=1e-6)


def test_on_the_floor_almost_every_step_aligns() -> None:
    near = critical_step_size(STEEP, FLAT, 1e-9, 1.0, noise(TOP), 0.0)
    assert near < 1e-8


def test_where_bulk_noise_rules_no_step_aligns() -> None:
    assert critical_step_size(1.0, 0.9, 1.0, 1e-9, 0.0, 1.0) == math.inf


def test_the_stationary_value_is_left_as_it_is_by_a_step() -> None:
    value = stationary(0.3, STEEP, 5.0)
    assert expected_after_step(0.3, STEEP, value, 5.0) == pytest.approx(value, rel=1e-12)
    assert stationary(1.0, STEEP, 5.0) == math.inf


def test_at_stationarity_the_critical_learning_rate_is_the_learning_rate() -> None:
    value = stationary(0.3, STEEP, 5.0)
    assert critical_learning_rate(STEEP, value, 5.0) == pytest.approx(0.3, rel=1e-12)


def test_sgd_with_independent_batches_settles_at_the_stationary_value() -> None:
    stream = np.random.default_rng(0)
    lr, runs = 0.3, 2000
    theta = np.zeros((runs, D))
    for _ in range(60):
        theta -= lr * (SPECTRUM * theta - SLOPES[stream.integers(len(SLOPES), size=runs)])
    measured = float(np.mean(np.sum((SPECTRUM * theta)[:, TOP] ** 2, axis=1)))
    # A sum of K squares over 2000 runs: standard error sqrt(2 / (4 * 2000)) = 1.6 %.
    assert measured == pytest.approx(stationary(lr, STEEP, noise(TOP)), rel=0.06)
