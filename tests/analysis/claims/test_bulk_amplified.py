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
