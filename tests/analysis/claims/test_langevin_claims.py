from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from thalweg import registry
from thalweg.analysis.claims import Verdict, judge

CLAIMS = {name: claim for name, claim in registry.claims.items() if "langevin" in name}
SAVES, MATCHES = CLAIMS
STEPS = np.unique(np.geomspace(1, 1e6, 60).round())


def chains(**needed: float) -> pd.DataFrame:
    """Errors that fall as 0.1 needed / gradients down to 0.05, for branches of any cost a step."""
    frames = [
        pd.DataFrame(
            {
                "seed": seed,
                "branch": branch,
                "step": STEPS,
                "gradients": STEPS * cost,
                "covariance_error": np.maximum(
                    0.1 * gradients * 1.02 ** (seed - 1) / (STEPS * cost), 0.05
                ),
            }
        )
        for seed in range(3)
        for cost, (branch, gradients) in zip((1.0, 0.3, 1.0), needed.items(), strict=False)
    ]
    return pd.concat(frames, ignore_index=True)


def judged(name: str, data: pd.DataFrame) -> Verdict:
    roles = {role: role for role in ("plain", "preconditioned", "subspace")}
    return judge(CLAIMS[name], data, roles)


def test_gradients_to_the_accuracy_are_read_between_rows() -> None:
    data = chains(plain=5000.0, subspace=123.0, preconditioned=100.0)
    saves, matches = judged(SAVES, data), judged(MATCHES, data)
    assert saves.outcome == matches.outcome == "holds"
    assert saves.mean == pytest.approx(123 / 5000)
    assert matches.mean == pytest.approx(1.23)
    assert saves.beside["gradients of plain"] == pytest.approx(5000, rel=1e-3)


def test_blocks_that_save_nothing_refute_both() -> None:
    data = chains(plain=5000.0, subspace=4000.0, preconditioned=100.0)
    assert judged(SAVES, data).outcome == "does not hold"
    assert judged(MATCHES, data).outcome == "does not hold"


@pytest.mark.parametrize(("needed", "why"), [(1e9, "reached not in"), (0.01, "first row")])
def test_an_accuracy_that_is_never_or_always_met_leaves_it_undecided(
    needed: float, why: str
) -> None:
    data = chains(plain=5000.0, subspace=needed)
    verdict = judged(SAVES, data)
    assert verdict.outcome == "undecided"
    assert why in verdict.note


def test_an_accuracy_that_is_lost_again_counts_from_where_it_stays() -> None:
    data = chains(plain=5000.0, subspace=50.0)
    late = (data["branch"] == "subspace") & (data["gradients"].between(900, 1300))
    assert late.any()
    data.loc[late, "covariance_error"] = 0.2
    assert judged(SAVES, data).beside["gradients of subspace"] > 900
