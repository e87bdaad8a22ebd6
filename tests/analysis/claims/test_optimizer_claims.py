from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.analysis.claims.branches import LENGTH, falling, table, verdict_of, without

CURVATURE = np.r_[np.full(3, 1.0), np.full(30, 0.01)]
K = 3
PARTS = {"dominant": slice(0, K), "bulk": slice(K, None)}


def descent(lr: float, momentum: float = 0.0, seed: int = 0) -> pd.DataFrame:
    """Heavy ball on a quadratic with noisy gradients: numerators and denominators of each step."""
    stream = np.random.default_rng(seed)
    theta, velocity = np.r_[np.full(K, 1.0), np.full(30, 10.0)], np.zeros(33)
    rows = []
    for step in range(LENGTH):
        gradient = CURVATURE * theta
        noisy = gradient + 0.3 * np.sqrt(CURVATURE) * stream.standard_normal(33)
        velocity = momentum * velocity + noisy
        row = {"step": step}
        for part, where in PARTS.items():
            row[f"lr_numerator_{part}"] = lr * velocity[where] @ gradient[where]
            row[f"lr_denominator_{part}"] = gradient[where] @ gradient[where]
        rows.append(row)
        theta = theta - lr * velocity
    return pd.DataFrame(rows)


def pair(plain: dict[str, float], other: dict[str, float]) -> pd.DataFrame:
    frames = [
        descent(**settings, seed=seed).assign(seed=seed, branch=name)
        for seed in range(3)
        for name, settings in (("sgd", plain), ("momentum", other))
    ]
    return pd.concat(frames, ignore_index=True)


ROLES = {"plain": "sgd", "other": "momentum"}


def test_momentum_on_a_noisy_quadratic_favours_the_bulk() -> None:
    data = pair({"lr": 0.1}, {"lr": 0.1, "momentum": 0.9})
    verdict = verdict_of("favours-bulk", data, **ROLES)
    assert verdict.outcome == "holds", verdict
    # Along a direction that hardly curves, heavy ball goes 1 / (1 - momentum) times as fast.
    assert 7 < verdict.beside["bulk, momentum"] / verdict.beside["bulk, sgd"] < 10


def test_sgd_with_another_learning_rate_favours_neither_part() -> None:
    verdict = verdict_of("favours-bulk", pair({"lr": 0.1}, {"lr": 0.02}), **ROLES)
    assert verdict.outcome == "does not hold"
    assert verdict.mean == pytest.approx(1.0, abs=0.2)


def rates(favour: float, scale: float = 1.0) -> pd.DataFrame:
    """SGD of learning rate 0.1 in both parts, and another whose bulk is `favour` times as fast."""
    columns = {"lr_denominator_dominant": 4.0 * scale, "lr_denominator_bulk": 1.0 * scale}
    numerators = {"lr_numerator_dominant": 0.4 * scale, "lr_numerator_bulk": 0.1 * scale}
    other = numerators | {"lr_numerator_bulk": 0.1 * favour * scale}
    data = table(sgd={**columns, **numerators}, momentum={**columns, **other})
    spread = (data["branch"] == "momentum") & (data["step"] > 100)
    data.loc[spread, "lr_numerator_bulk"] *= np.exp(0.02 * (data.loc[spread, "seed"] - 1))
    return data


@pytest.mark.parametrize(
    ("outcome", "favour"), [("holds", 3.0), ("does not hold", 0.7), ("undecided", 1.5)]
)
def test_favours_bulk_is_the_ratio_of_the_ratios(outcome: str, favour: float) -> None:
    verdict = verdict_of("favours-bulk", rates(favour), **ROLES)
    assert verdict.outcome == outcome
    assert verdict.mean == pytest.approx(favour, rel=1e-3)
    assert verdict.beside["dominant, sgd"] == pytest.approx(0.1)


@settings(max_examples=5, deadline=None)
@given(scale=st.floats(1e-6, 1e6))
def test_the_scale_of_the_gradient_does_not_matter(scale: float) -> None:
    verdict = verdict_of("favours-bulk", rates(3.0, scale), **ROLES)
    assert verdict.mean == pytest.approx(3.0, rel=1e-3)


def test_a_row_with_half_of_a_ratio_is_left_out() -> None:
    data = rates(3.0)
    last = data["step"] == data["step"].max()
    verdict = verdict_of("favours-bulk", without(data, last, "lr_numerator_bulk"), **ROLES)
    assert verdict.mean == pytest.approx(3.0, rel=1e-3)


def test_a_dominant_part_that_goes_uphill_has_no_ratio() -> None:
    data = rates(3.0)
    data.loc[data["branch"] == "momentum", "lr_numerator_dominant"] *= -1
    verdict = verdict_of("favours-bulk", data, **ROLES)
    assert verdict.outcome == "undecided"
    assert "effective learning rate of momentum" in verdict.note


def test_a_gradient_without_a_bulk_has_no_effective_learning_rate() -> None:
    data = rates(3.0)
    data["lr_denominator_bulk"] = 0.0
    assert "the bulk part of the gradient of sgd is zero" in (
        verdict_of("favours-bulk", data, **ROLES).note
    )


def both_metrics(own: float, euclidean: float = 0.5) -> pd.DataFrame:
    columns = {"alignment_proposed_own_metric": own, "alignment_proposed": euclidean}
    return table(adam={"loss": falling(0.5), **columns}, spread=0.05)


@pytest.mark.parametrize(
    ("outcome", "own"), [("holds", 0.89), ("does not hold", 0.5), ("undecided", 0.55)]
)
def test_the_update_is_more_aligned_in_the_optimizers_own_metric_or_not(
    outcome: str, own: float
) -> None:
    data = both_metrics(own)
    data["alignment_proposed_own_metric"] += 0.01 * (data["seed"] - 1)
    verdict = verdict_of("own-metric-aligns", data, plain="adam")
    assert verdict.outcome == outcome
    assert verdict.mean == pytest.approx(own - 0.5, abs=1e-3)


def test_the_metrics_are_compared_at_the_rows_in_which_both_were_measured() -> None:
    data = both_metrics(0.89)
    seldom = data["step"] % 50 != 0
    data.loc[seldom, "alignment_proposed"] = 0.99
    data = without(data, seldom, "alignment_proposed_own_metric")
    verdict = verdict_of("own-metric-aligns", data, plain="adam")
    assert verdict.mean == pytest.approx(0.39, abs=1e-3)
