from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from tests.analysis.claims.branches import falling, table, verdict_of

ROLES = {"plain": "sgd", "amplified": "bulk"}


def pair(end: float, start: float = 1.0) -> pd.DataFrame:
    """Losses that fall geometrically: to 0.1 without, to `end` with the bulk scaled up."""
    return table(0.001, sgd={"loss": falling(0.1)}, bulk={"loss": falling(end, start=start)})


@pytest.mark.parametrize(("outcome", "end"), [("holds", 0.05), ("does not hold", 0.2)])
def test_the_loss_is_lower_or_not(outcome: str, end: float) -> None:
    verdict = verdict_of("bulk-amplified-lowers-loss", pair(end), **ROLES)
    assert verdict.outcome == outcome, verdict
    part = np.arange(36, 41) / 40
    assert verdict.mean == pytest.approx(np.mean(end**part) / np.mean(0.1**part), rel=1e-2)


@pytest.mark.parametrize(("outcome", "end"), [("holds", 0.01), ("does not hold", 0.1)])
def test_steps_to_the_loss_are_counted(outcome: str, end: float) -> None:
    verdict = verdict_of("bulk-amplified-saves-steps", pair(end), **ROLES)
    assert verdict.outcome == outcome, verdict
    # The exponents of two falls to one loss are inversely as the numbers of steps, rows of 5 apart.
    assert verdict.mean == pytest.approx(np.log(0.1) / np.log(end), abs=0.03)


def test_a_branch_that_never_gets_there_counts_with_all_its_steps() -> None:
    verdict = verdict_of("bulk-amplified-saves-steps", pair(0.5), **ROLES)
    assert verdict.outcome == "does not hold"
    assert verdict.mean == pytest.approx(200 / 190, rel=0.03)
    assert "bulk never reaches the loss" in verdict.note


@pytest.mark.parametrize(("outcome", "own"), [("holds", 0.12), ("does not hold", 0.3)])
def test_a_batchs_own_hessian_does_as_well_or_not(outcome: str, own: float) -> None:
    losses = table(0.001, everything={"loss": falling(0.1)}, batch={"loss": falling(own)})
    roles = {"all-data": "everything", "own-batch": "batch"}
    verdict = verdict_of("batch-hessian-suffices", losses, **roles)
    assert verdict.outcome == outcome, verdict
    part = np.arange(36, 41) / 40
    expected = (1 - np.mean(own**part)) / (1 - np.mean(0.1**part))
    assert verdict.mean == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("name", ["bulk-amplified-lowers-loss", "bulk-amplified-saves-steps"])
def test_branches_that_start_apart_are_not_compared(name: str) -> None:
    verdict = verdict_of(name, pair(0.05, start=0.5), **ROLES)
    assert verdict.outcome == "undecided"
    assert "start at different losses" in verdict.note


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("gauss-newton-energy-is-dominant", "energy_gauss_newton_dominant"),
        ("residual-energy-is-dominant", "energy_residual_dominant"),
    ],
)
@pytest.mark.parametrize(("outcome", "late"), [("holds", 0.7), ("does not hold", 0.3)])
def test_energy_counts_over_the_last_half(
    name: str, column: str, outcome: str, late: float
) -> None:
    values = {"loss": falling(0.5), column: lambda part: np.where(part < 0.5, 1 - late, late)}
    verdict = verdict_of(name, table(sgd=values), plain="sgd")
    assert verdict.outcome == outcome, verdict
    assert verdict.mean == pytest.approx(late, rel=1e-2)


POWER_ROLES = {"plain": "adam", "powered": "adam-power"}


def with_powers(ratio: float, start: float = 1.0) -> pd.DataFrame:
    """Losses that fall geometrically from 1, that with powers to `ratio` times the other."""
    return table(
        adam={"loss": falling(0.1)}, adam_power={"loss": falling(0.1 * ratio, start=start)}
    )


@pytest.mark.parametrize(
    ("outcome", "ratio"), [("holds", 0.8), ("does not hold", 1.2), ("undecided", 1.0)]
)
def test_powers_lower_the_loss_or_not(outcome: str, ratio: float) -> None:
    verdict = verdict_of("grad-power-lowers-loss", with_powers(ratio), **POWER_ROLES)
    assert verdict.outcome == outcome, verdict
    # The last tenth of the 41 rows: five.
    part = np.arange(36, 41) / 40
    expected = np.mean((0.1 * ratio) ** part) / np.mean(0.1**part)
    assert verdict.mean == pytest.approx(float(expected), rel=1e-3)


def test_powers_are_not_compared_from_another_start() -> None:
    verdict = verdict_of("grad-power-lowers-loss", with_powers(0.8, start=0.5), **POWER_ROLES)
    assert verdict.outcome == "undecided"
    assert "start at different losses" in verdict.note


RANK_ROLES = {"full": "muon", "low": "dion-quarter"}


def low_rank(ratio: float, spread: float = 0.01) -> pd.DataFrame:
    return table(spread, muon={"loss": falling(0.1)}, dion_quarter={"loss": falling(0.1 * ratio)})


@pytest.mark.parametrize(
    ("outcome", "ratio"), [("holds", 0.9), ("holds", 1.03), ("does not hold", 1.5)]
)
def test_a_low_rank_may_cost_a_tenth_of_the_loss(outcome: str, ratio: float) -> None:
    verdict = verdict_of("low-rank-suffices", low_rank(ratio), **RANK_ROLES)
    assert verdict.outcome == outcome, verdict
    assert verdict.mean == pytest.approx(ratio, rel=0.03)


def test_seeds_that_disagree_on_low_rank_leave_it_open() -> None:
    assert (
        verdict_of("low-rank-suffices", low_rank(1.1, spread=0.2), **RANK_ROLES).outcome
        == "undecided"
    )
