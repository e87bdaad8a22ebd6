from __future__ import annotations

import math

import pandas as pd

from thalweg.analysis.claims.subspace_caveat import subspace_caveat

TARGETS = {"trunk": 0.01, "bulk": 0.01}


def table(errors: list[float], below: list[float], branch: str = "bulk") -> pd.DataFrame:
    return pd.DataFrame(
        {
            "branch": branch,
            "subspace_error": errors,
            "next_eigenvalue": below,
            "eigenvalues": [[9.0, 4.0]] * len(errors),
        }
    )


def test_a_branch_that_missed_its_target_is_named_with_how_often() -> None:
    fine = table([0.001] * 10, [1.0] * 10, "trunk")
    missed = table([0.02] * 3 + [0.001] * 7, [1.0] * 10)
    caveat = subspace_caveat(pd.concat([fine, missed]), TARGETS)
    assert caveat == "the subspace missed its target of 1 % in 30 % of bulk's rows"
    of_each = {"trunk": 0.0005, "bulk": 0.05}
    assert subspace_caveat(pd.concat([fine, missed]), of_each) == (
        "the subspace missed its target of 0.05 % in 100 % of trunk's rows"
    )


def test_a_closed_gap_is_said_in_place_of_a_miss() -> None:
    rows = table([0.5, 0.001, 0.001, 0.001], [3.9, 1.0, 1.0, 1.0])
    assert subspace_caveat(rows, TARGETS) == (
        "the subspace is ill defined at this k in 25 % of bulk's rows"
    )


def test_what_is_not_known_counts_for_nothing() -> None:
    assert subspace_caveat(table([math.nan] * 4, [3.9] * 4), TARGETS) == ""
    rows = table([0.02, math.nan], [math.nan] * 2)
    assert subspace_caveat(rows, TARGETS).endswith("in 100 % of bulk's rows")
    assert subspace_caveat(rows.drop(columns=["eigenvalues"]), TARGETS) != ""
    assert subspace_caveat(pd.DataFrame({"branch": ["trunk"]}), TARGETS) == ""
    lost = rows.assign(eigenvalues=None)
    assert subspace_caveat(lost, TARGETS) != ""
