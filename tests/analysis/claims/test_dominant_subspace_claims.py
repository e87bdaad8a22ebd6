from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from tests.analysis import synthetic
from tests.analysis.claims.branches import falling, table, verdict_of
from thalweg import registry
from thalweg.analysis.claims import judge


@pytest.fixture(scope="module")
def study() -> pd.DataFrame:
    return synthetic.study()


@pytest.mark.parametrize(
    "spectrum",
    [
        np.full(20, 2.0),
        np.geomspace(5.0, 0.01, 20),
        1 / np.arange(1, 21),
        1 / np.arange(1, 21) ** 2,
        np.linspace(2.0, 0.1, 20),
        np.r_[50.0, np.geomspace(2.0, 1.0, 19)],
    ],
    ids=["flat", "geometric", "power 1", "power 2", "linear", "one outlier"],
)
def test_a_spectrum_without_a_gap_at_k_has_no_gap(spectrum: np.ndarray) -> None:
    verdict = judge(registry.claims["spectrum-gap"], synthetic.with_spectrum(spectrum))
    assert verdict.outcome == "does not hold"


def test_a_bulk_of_zero_or_negative_eigenvalues_is_a_gap() -> None:
    spectrum = np.r_[np.linspace(3, 1, 10), np.linspace(1e-9, -0.2, 10)]
    assert (
        judge(registry.claims["spectrum-gap"], synthetic.with_spectrum(spectrum)).outcome == "holds"
    )


def test_a_gap_for_two_classes_is_seen() -> None:
    spectrum = np.array([4.0, 2.5, 0.4, 0.35])
    verdict = judge(registry.claims["spectrum-gap"], synthetic.with_spectrum(spectrum))
    assert verdict.outcome == "holds"
    assert verdict.mean == pytest.approx(2.5**2 / (4.0 * 0.4))


@pytest.mark.parametrize(
    ("claim", "column", "threshold"),
    [
        ("subspace-persists", "overlap_branch_point", 0.5),
        ("update-aligns", "alignment_proposed", 0.7),
    ],
)
def test_the_mean_of_the_last_half_is_held_against_the_rule(
    claim: str, column: str, threshold: float
) -> None:
    cases = {"holds": 1.2, "does not hold": 0.6, "undecided": 1.0}
    for outcome, factor in cases.items():
        late = threshold * factor
        data = table(
            sgd={
                "loss": falling(0.5),
                column: lambda part, late=late: np.where(part < 0.5, 0.01, late),
            }
        )
        verdict = verdict_of(claim, data, plain="sgd")
        assert verdict.outcome == outcome
        assert verdict.mean == pytest.approx(late, rel=1e-3)


def test_random_subspaces_do_not_persist() -> None:
    stream = np.random.default_rng(0)
    k, parameters = 10, 400
    first = np.linalg.qr(stream.standard_normal((parameters, k)))[0]
    overlap = []
    for _ in range(41):
        other = np.linalg.qr(stream.standard_normal((parameters, k)))[0]
        overlap.append(((first.T @ other) ** 2).sum() / k)
    data = table(sgd={"loss": falling(0.5), "overlap_branch_point": lambda _: np.array(overlap)})
    verdict = verdict_of("subspace-persists", data, plain="sgd")
    assert verdict.outcome == "does not hold"
    assert verdict.mean == pytest.approx(k / parameters, rel=0.1)


def test_an_orthogonalized_update_does_not_align() -> None:
    stream = np.random.default_rng(0)
    k, rows, columns = 10, 20, 20
    chi = []
    for _ in range(41):
        # All but k entries of the gradient are small; the nearest orthogonal matrix forgets that.
        gradient = stream.standard_normal((rows, columns)) * 0.01
        gradient[0, :k] += 1
        left, _, right = np.linalg.svd(gradient)
        update = left @ right
        chi.append(np.linalg.norm(update[0, :k]) / np.linalg.norm(update))
    data = table(muon={"loss": falling(0.5), "alignment_proposed": lambda _: np.array(chi)})
    assert verdict_of("update-aligns", data, plain="muon").outcome == "does not hold"
