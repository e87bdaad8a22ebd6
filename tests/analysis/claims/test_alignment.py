from __future__ import annotations

import numpy as np
import pytest

from tests.analysis.claims.branches import falling, table, verdict_of


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
