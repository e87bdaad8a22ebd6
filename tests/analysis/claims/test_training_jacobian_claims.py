from __future__ import annotations

import pandas as pd
import pytest

from thalweg import registry
from thalweg.analysis.claims import Verdict, judge

CLAIMS = {name: claim for name, claim in registry.claims.items() if name.startswith("jacobian-")}
ROLES = {"plain": "digits", "white-noise": "white-noise"}
#: What a run as the paper describes it would give; the other branch has the share alone.
DESCRIBED = {
    "bulk_share_1e-02": 0.7,
    "bulk_share_1e-03": 0.5,
    "bulk_share_1e-06": 0.1,
    "chaotic_share": 0.1,
    "stable_share": 0.2,
    "singular_value_max": 300.0,
    "bulk_cosine": 0.99,
    "outside_cosine": 0.4,
    "overlap_seeds": 0.9,
    "chance_seeds": 0.7,
    "overlap_shuffled": 0.95,
    "chance_shuffled": 0.7,
    "loss_start": 2.3,
    "loss_end": 0.1,
    "loss_in_bulk": 2.2,
    "loss_out_of_bulk": 0.1,
    "loss_in_random": 0.5,
    "loss_out_of_random": 0.2,
}


def judged(name: str, noise: float = 0.1, **changed: float) -> Verdict:
    rows = []
    for seed in range(3):
        values = {**DESCRIBED, **changed}
        spread = 1 + 0.01 * (seed - 1)
        own = {column: value * spread for column, value in values.items()}
        rows.append({"seed": seed, "branch": "digits", "step": 625, **own})
        rows.append({"seed": seed, "branch": "white-noise", "step": 625, "bulk_share_1e-02": noise})
    return judge(CLAIMS[name], pd.DataFrame(rows), ROLES)


@pytest.mark.parametrize("name", CLAIMS)
def test_a_run_as_the_paper_describes_it_makes_every_claim_hold(name: str) -> None:
    verdict = judged(name)
    assert verdict.outcome == "holds", verdict
    assert verdict.note == ""


def test_overlaps_are_counted_from_chance() -> None:
    verdict = judged("jacobian-bulk-is-shared")
    assert verdict.mean == pytest.approx(0.2 / 0.3, rel=1e-2)
    assert verdict.beside["of random subspaces"] == pytest.approx(0.7, rel=1e-2)


def test_training_in_the_bulk_is_measured_by_its_progress() -> None:
    verdict = judged("jacobian-bulk-cannot-learn")
    assert verdict.mean == pytest.approx(1 - 0.1 / 2.2, rel=1e-6)
    beside = verdict.beside["the statistic of a random subspace"]
    assert beside == pytest.approx(1 - 1.8 / 2.2, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("jacobian-has-a-bulk", {"bulk_share_1e-02": 0.2}),
        ("jacobian-is-chaotic", {"singular_value_max": 1.5}),
        ("jacobian-carries-the-bulk", {"bulk_cosine": 0.3}),
        # Random subspaces overlap by chance, and by no more.
        ("jacobian-bulk-is-shared", {"overlap_seeds": 0.7}),
        ("jacobian-bulk-ignores-labels", {"overlap_shuffled": 0.7}),
        # A bulk that the architecture makes does not shrink.
        ("jacobian-bulk-needs-the-inputs", {"noise": 0.7}),
        ("jacobian-bulk-cannot-learn", {"loss_in_bulk": 0.5}),
        ("jacobian-bulk-cannot-learn", {"loss_out_of_bulk": 1.9}),
    ],
)
def test_what_would_refute_a_claim_does(name: str, changed: dict[str, float]) -> None:
    assert judged(name, **changed).outcome == "does not hold"


@pytest.mark.parametrize(
    ("name", "changed", "why"),
    [
        ("jacobian-bulk-is-shared", {"chance_seeds": 1.1}, "all of parameter space"),
        ("jacobian-bulk-cannot-learn", {"loss_end": 2.4}, "takes the loss from"),
        ("jacobian-has-a-bulk", {"bulk_share_1e-02": 0.5}, "contains the threshold"),
    ],
)
def test_what_cannot_be_told_stays_undecided(
    name: str, changed: dict[str, float], why: str
) -> None:
    verdict = judged(name, **changed)
    assert verdict.outcome == "undecided"
    assert why in verdict.note
