from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from tests.analysis.claims.branches import falling, table, verdict_of


def controlled(control: float) -> pd.DataFrame:
    return table(
        sgd={"loss": falling(0.5), "alignment_gradient": 0.95},
        sgd_next={"loss": falling(0.5), "alignment_gradient": control},
        spread=0.005,
    )


@pytest.mark.parametrize(
    ("outcome", "chi"), [("holds", 0.2), ("does not hold", 0.9), ("undecided", 0.475)]
)
def test_a_control_holds_the_gradient_or_not(outcome: str, chi: float) -> None:
    verdict = verdict_of("control-does-not-align", controlled(chi), plain="sgd", control="sgd-next")
    assert verdict.outcome == outcome
    assert verdict.mean == pytest.approx(chi / 0.95)


def test_a_control_that_contains_the_dominant_subspace_aligns_as_well() -> None:
    stream = np.random.default_rng(0)
    gradients = stream.standard_normal((41, 200)) * np.r_[np.full(10, 50.0), np.ones(190)]
    norms = np.linalg.norm(gradients, axis=1)
    chi = {k: np.linalg.norm(gradients[:, :k], axis=1) / norms for k in (10, 20)}
    data = table(
        sgd={"loss": falling(0.5), "alignment_gradient": lambda _: chi[10]},
        sgd_double={"loss": falling(0.5), "alignment_gradient": lambda _: chi[20]},
    )
    verdict = verdict_of("control-does-not-align", data, plain="sgd", control="sgd-double")
    assert verdict.outcome == "does not hold"
    assert verdict.mean == pytest.approx(1.0, abs=0.01)


def tracked(exact: float, log_difference: float, spread: float = 0.0) -> pd.DataFrame:
    """Two branches that end at `exact` and at `exact` times exp(log_difference).

    The difference grows and shrinks with the seed by the factor 1 + spread.
    """
    data = table(
        bulk_gd_exact={"loss": falling(exact)}, bulk_gd={"loss": falling(exact)}, spread=0.0
    )
    later = (data["branch"] == "bulk-gd") & (data["step"] > 100)
    grown = log_difference * (1 + spread * (data.loc[later, "seed"] - 1))
    data.loc[later, "loss"] *= np.exp(grown)
    return data


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("outcome", "share"), [("holds", 0.02), ("does not hold", 0.3), ("undecided", 0.1)]
)
def test_the_difference_is_a_part_of_the_progress(outcome: str, share: float, sign: int) -> None:
    # The progress that counts is to the mean over the last tenth, a little above the very end.
    data = tracked(0.2, 0.0)
    exact = data[data["branch"] == "bulk-gd-exact"]
    progress = -math.log(exact[exact["seed"] == 0]["loss"].tail(5).mean())
    data = tracked(0.2, sign * share * progress, spread=0.1)
    verdict = verdict_of("tracked-equals-exact", data, tracked="bulk-gd", exact="bulk-gd-exact")
    assert verdict.outcome == outcome
    assert verdict.mean == pytest.approx(share)


@pytest.mark.parametrize("end", [1.0, 1.1])
@pytest.mark.parametrize(
    ("outcome", "difference"), [("holds", 0.01), ("does not hold", 0.04), ("undecided", 0.02)]
)
def test_without_progress_two_per_cent_of_the_loss_are_allowed(
    outcome: str, difference: float, end: float
) -> None:
    data = tracked(end, difference, spread=0.1)
    verdict = verdict_of("tracked-equals-exact", data, tracked="bulk-gd", exact="bulk-gd-exact")
    assert verdict.outcome == outcome
