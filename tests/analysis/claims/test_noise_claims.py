from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.analysis.claims.branches import falling, table, verdict_of, without


def aligned(**chi: float) -> pd.DataFrame:
    """Branches that fall alike from one checkpoint and have the given alignments."""
    columns = {
        name: {"loss": falling(0.5), "alignment_gradient": value} for name, value in chi.items()
    }
    return table(**columns)


@pytest.mark.parametrize(
    ("claim", "roles", "held", "refuted", "threshold"),
    [
        ("alignment-is-noise", ("noisy", "calm"), 0.3, 0.95, 0.8),
        ("alignment-returns", ("noisy", "returned"), 0.94, 0.3, 0.9),
        ("noise-inside-aligns", ("inside", "outside"), 0.4, 0.95, 0.7),
        ("larger-batches-align-less", ("small", "large"), 0.6, 0.95, 0.9),
    ],
)
def test_the_alignments_of_two_branches_are_held_against_the_rule(
    claim: str, roles: tuple[str, str], held: float, refuted: float, threshold: float
) -> None:
    names = dict(zip(roles, ("one", "two"), strict=True))
    cases = {"holds": held, "does not hold": refuted, "undecided": threshold * 0.95}
    for outcome, chi in cases.items():
        verdict = verdict_of(claim, aligned(one=0.95, two=chi), **names)
        assert verdict.outcome == outcome, verdict
        assert verdict.mean == pytest.approx(chi / 0.95)
        assert verdict.beside["mean of two"] == pytest.approx(chi, rel=1e-3)


@settings(max_examples=5, deadline=None)
@given(factor=st.floats(1e-3, 1.0), calm=st.floats(0.05, 1.0))
def test_only_the_ratio_of_the_alignments_counts(factor: float, calm: float) -> None:
    names = {"noisy": "sgd", "calm": "gd"}
    whole = verdict_of("alignment-is-noise", aligned(sgd=1.0, gd=calm), **names)
    scaled = verdict_of("alignment-is-noise", aligned(sgd=factor, gd=factor * calm), **names)
    assert scaled.mean == pytest.approx(whole.mean)


def test_only_the_last_half_counts() -> None:
    def late(part: np.ndarray) -> np.ndarray:
        return np.where(part < 0.5, 0.95, 0.3)

    data = table(
        sgd={"loss": falling(0.5), "alignment_gradient": 0.95},
        gd={"loss": falling(0.5), "alignment_gradient": late},
    )
    verdict = verdict_of("alignment-is-noise", data, noisy="sgd", calm="gd")
    assert verdict.mean == pytest.approx(0.3 / 0.95)


def test_a_returned_branch_begins_where_the_calm_one_ends() -> None:
    before = aligned(sgd=0.95, gd=0.3)
    after = table(first=300, sgd_again={"loss": falling(0.3, 0.5), "alignment_gradient": 0.94})
    data = pd.concat([before, after])
    assert verdict_of("alignment-returns", data, noisy="sgd", returned="sgd-again").outcome == (
        "holds"
    )
    verdict = verdict_of("alignment-is-noise", aligned(sgd=0.95, gd=0.3), noisy="sgd", calm="gd")
    assert verdict.outcome == "holds"


def test_branches_of_different_checkpoints_say_nothing_of_the_cause() -> None:
    data = aligned(sgd=0.95, gd=0.3)
    data.loc[data["branch"] == "gd", "loss"] *= 2
    verdict = verdict_of("alignment-is-noise", data, noisy="sgd", calm="gd")
    assert verdict.outcome == "undecided"
    assert "different losses" in verdict.note


@pytest.mark.parametrize(
    ("outcome", "end"), [("holds", 0.49), ("does not hold", 0.7), ("undecided", 0.525)]
)
def test_a_calm_branch_keeps_falling_or_not(outcome: str, end: float) -> None:
    data = table(sgd={"loss": falling(0.5)}, gd={"loss": falling(end)})
    verdict = verdict_of("calm-keeps-falling", data, noisy="sgd", calm="gd")
    assert verdict.outcome == outcome
    assert verdict.mean == pytest.approx(end / 0.5, rel=0.02)


def test_a_calm_branch_that_stands_still_does_not_keep_falling() -> None:
    data = table(sgd={"loss": falling(0.5)}, gd={"loss": 1.0})
    verdict = verdict_of("calm-keeps-falling", data, noisy="sgd", calm="gd")
    assert verdict.outcome == "does not hold"


def test_where_the_noisy_branch_stands_still_too_nothing_is_shown() -> None:
    data = table(sgd={"loss": 1.0}, gd={"loss": 1.0}, spread=0.001)
    verdict = verdict_of("calm-keeps-falling", data, noisy="sgd", calm="gd")
    assert verdict.outcome == "undecided"
    assert "no decrease to compare with" in verdict.note


def test_a_calm_branch_that_diverges_does_not_keep_falling() -> None:
    data = table(sgd={"loss": falling(0.5)}, gd={"loss": falling(0.5)})
    data = without(data, (data["branch"] == "gd") & (data["step"] > 200), "loss")
    verdict = verdict_of("calm-keeps-falling", data, noisy="sgd", calm="gd")
    assert verdict.outcome == "does not hold"
    assert math.isinf(verdict.mean)


@pytest.mark.parametrize(
    ("outcome", "share"), [("holds", 0.7), ("does not hold", 0.3), ("undecided", 0.5)]
)
def test_the_share_of_the_noise_is_a_mean_over_the_branch(outcome: str, share: float) -> None:
    def varying(part: np.ndarray) -> np.ndarray:
        return share * np.exp(0.1 * np.sin(2 * np.pi * part))

    data = table(sgd={"loss": falling(0.5), "noise_share_dominant": varying})
    verdict = verdict_of("noise-is-dominant", data, plain="sgd")
    assert verdict.outcome == outcome
    assert verdict.mean == pytest.approx(share, rel=0.01)


def test_isotropic_noise_is_not_dominant() -> None:
    # Any k coordinates of a standard normal vector hold k / P of its variance.
    noise = np.random.default_rng(0).standard_normal((41, 50, 300))
    share = noise[..., :10].var(axis=1).sum(axis=1) / noise.var(axis=1).sum(axis=1)
    data = table(sgd={"loss": falling(0.5), "noise_share_dominant": lambda _: share})
    verdict = verdict_of("noise-is-dominant", data, plain="sgd")
    assert verdict.outcome == "does not hold"
    assert verdict.mean == pytest.approx(10 / 300, rel=0.05)


def test_a_probe_that_is_due_seldom_gives_the_same_mean() -> None:
    data = table(sgd={"loss": falling(0.5), "noise_share_dominant": 0.7})
    sparse = without(data, data["step"] % 50 != 0, "noise_share_dominant")
    assert verdict_of("noise-is-dominant", sparse, plain="sgd").mean == pytest.approx(
        verdict_of("noise-is-dominant", data, plain="sgd").mean, rel=1e-3
    )
