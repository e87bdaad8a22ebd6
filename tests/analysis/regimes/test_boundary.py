"""Boundaries in the plane: those that are there are found, and none where there is none."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from tests.analysis.regimes.sweeps import Settings, grid, sweep_of
from thalweg.analysis.regimes.boundary import (
    LIKELIEST_CHANCE,
    Boundary,
    Edge,
    boundary_along,
    is_learning_rate,
    judge_plane,
)
from thalweg.analysis.regimes.plane import varying
from thalweg.analysis.regimes.table import SweepTable

LR, BATCH = [0.003, 0.01, 0.03, 0.1, 0.3], [10, 50, 250, 1250]
PLANE = grid(lr=LR, batch_size=BATCH)
WORDS = {True: "holds", False: "does not hold", None: "undecided"}


def table_of(
    settings: Iterable[Settings],
    outcomes: Sequence[bool | None],
    sharpness: Sequence[float] | None = None,
    left_out: Iterable[int] = (),
) -> SweepTable:
    """A table with one claim; the points `left_out` have no verdict."""
    sweep = sweep_of(Path("nowhere"), settings)
    points = range(len(sweep.points))
    judged = [n for n in points if n not in set(left_out)]
    words = [WORDS[outcomes[n]] for n in judged]
    own = {"point": judged, "label": "claim", "outcome": words, "note": ""}
    verdicts = pd.DataFrame(own)
    runs = pd.DataFrame({"point": points, "branch": "sgd", "state": "done"})
    if sharpness is not None:
        runs["sharpness"] = sharpness
    return SweepTable(sweep, runs, verdicts, {key: key for key in sweep.keys})


def along(table: SweepTable) -> Boundary | None:
    rows = table.verdicts
    decided = {
        point: outcome == "holds"
        for point, outcome in zip(rows["point"], rows["outcome"], strict=True)
        if outcome != "undecided"
    }
    return boundary_along(decided, table, varying(table.sweep))


def said(table: SweepTable) -> str:
    verdict = judge_plane(table, "claim", "sgd")
    return "; ".join([*verdict.counts_in_words, *verdict.boundaries_in_words])


def outcomes_of(rule: Callable[[Settings], bool | None]) -> list[bool | None]:
    return [rule(settings) for settings in PLANE]


@examples(deadline=None, max_examples=50)
@given(
    key=st.sampled_from(["lr", "batch_size"]),
    cut=st.integers(0, 2),
    below=st.booleans(),
    undecided=st.sets(st.integers(0, 19), max_size=3),
    missing=st.sets(st.integers(0, 19), max_size=2),
)
def test_a_boundary_that_is_there_is_found(
    key: str, cut: int, below: bool, undecided: set[int], missing: set[int]
) -> None:
    values: list[float] = list({"lr": LR, "batch_size": BATCH}[key])
    outcomes: list[bool | None] = [(s[key] <= values[cut]) == below for s in PLANE]
    outcomes = [None if n in undecided else held for n, held in enumerate(outcomes)]
    decided = [n for n in range(20) if n not in undecided | missing]
    held = [PLANE[n][key] for n in decided if outcomes[n]]
    failed = [PLANE[n][key] for n in decided if not outcomes[n]]
    found = along(table_of(PLANE, outcomes, left_out=missing))
    if not held or not failed:
        assert found is None
        return
    near = Edge(max(held), min(failed)) if below else Edge(min(held), max(failed))
    assert found is not None
    assert (found.key, found.side, found.edges) == (key, "below" if below else "above", {})
    assert found.edge == near


@examples(deadline=None, max_examples=50)
@given(held=st.lists(st.booleans(), min_size=20, max_size=20))
def test_a_boundary_that_is_found_separates_every_point(held: list[bool]) -> None:
    found = along(table_of(PLANE, held))
    if found is None or found.edges:
        return
    for settings, is_held in zip(PLANE, held, strict=True):
        value = settings[found.key]
        inside = value <= found.edge.holds if found.side == "below" else value >= found.edge.holds
        assert inside == is_held


def test_random_planes_have_no_boundary() -> None:
    plane = grid(lr=[*LR, 1.0], batch_size=[*BATCH, 6250])
    random = np.random.default_rng(0)
    for _ in range(200):
        held = (random.random(30) < random.uniform(0.1, 0.9)).tolist()
        sharpness = np.exp(random.standard_normal(30)).tolist()
        verdict = judge_plane(table_of(plane, held, sharpness), "claim", "sgd")
        assert verdict.boundaries_in_words == ()


@pytest.mark.parametrize("holding", [1, 3, 4, 6])
def test_the_chance_is_that_of_all_planes_with_as_many_points_that_hold(holding: int) -> None:
    plane = grid(lr=[1, 2, 3], batch_size=[1, 2, 3])
    boundaries = [
        along(table_of(plane, [n in chosen for n in range(9)]))
        for chosen in combinations(range(9), holding)
    ]
    found = [boundary for boundary in boundaries if boundary is not None]
    whole = [boundary for boundary in found if not boundary.edges]
    for of_form, counted in ((whole, whole), ([b for b in found if b.edges], found)):
        if of_form:
            share = len(counted) / len(boundaries)
            # Orders that two settings give are counted for both.
            assert share <= of_form[0].chance + 1e-12
    if whole:
        assert len(whole) / len(boundaries) == pytest.approx(whole[0].chance)


def test_the_sentence_counts_values_and_points() -> None:
    table = table_of(PLANE, outcomes_of(lambda s: s["lr"] <= 0.03))
    assert said(table) == (
        "holds at 12 of 20 points, does not hold at 8; holds for lr ≤ 0.03 (3 of 5 values), not"
        " above"
    )
    table = table_of(PLANE, outcomes_of(lambda s: s["batch_size"] >= 250))
    assert said(table).endswith("holds for batch_size ≥ 250 (2 of 4 values), not below")


def test_undecided_points_count_as_neither() -> None:
    rule = outcomes_of(lambda s: None if s["lr"] == 0.03 else s["lr"] < 0.03)
    assert said(table_of(PLANE, rule, left_out=[0])) == (
        "holds at 7 of 20 points, does not hold at 8, is undecided at 4, is not judged yet at 1;"
        " holds for lr ≤ 0.01 (2 of 5 values), not for lr ≥ 0.1; between is undecided"
    )


def test_a_boundary_may_move_with_the_other_settings() -> None:
    table = table_of(PLANE, outcomes_of(lambda s: s["lr"] <= 0.0011 * s["batch_size"]))
    assert said(table).endswith(
        "holds for lr up to a boundary that the other settings move, and not above it: up to 0.01"
        " (batch_size = 10), 0.03 (batch_size = 50), 0.1 (batch_size = 250)"
    )


def test_one_point_on_the_wrong_side_undoes_a_boundary() -> None:
    held = outcomes_of(lambda s: s["lr"] <= 0.03)
    held[0] = False
    held[13] = True
    assert along(table_of(PLANE, held)) is None


def test_of_few_points_it_is_said_that_chance_orders_them_too() -> None:
    table = table_of(grid(lr=LR), [True, True, True, False, False])
    assert said(table).endswith("in 20% of cases: no boundary is stated")
    assert judge_plane(table, "claim", "sgd").boundaries_in_words == ()


def test_settings_that_are_no_numbers_have_no_boundary() -> None:
    plane = grid(batch_size=[10, 50, "all"], optimizer=["sgd", "adam", "muon"])
    assert along(table_of(plane, [s["batch_size"] == 10 for s in plane])) is None
    unset = [{"lr": 0.1}, {"lr": 0.2}, {}]
    assert along(table_of(unset, [True, False, False])) is None


def test_points_that_all_have_one_outcome_have_no_boundary() -> None:
    assert said(table_of(PLANE, [True] * 20)) == "holds at all 20 points"
    assert said(table_of(PLANE, [None] * 20)) == "holds at 0 of 20 points, is undecided at 20"


def test_a_boundary_relative_to_the_critical_learning_rate() -> None:
    sharpness = [2.0 * (1 + n % 4) for n in range(20)]
    ratios = [s["lr"] * curvature / 2 for s, curvature in zip(PLANE, sharpness, strict=True)]
    held = [ratio < 0.05 for ratio in ratios]
    text = said(table_of(PLANE, held, sharpness))
    found = re.search(
        r"below about (\S+) of the critical one \(2 / sharpness at the end of sgd\)", text
    )
    assert found is not None
    low, high = max(r for r in ratios if r < 0.05), min(r for r in ratios if r >= 0.05)
    assert float(found[1]) == pytest.approx(math.sqrt(low * high), rel=0.01)
    assert f"up to {low:.4f} it does, from {high:.4f} on it does not" in text


def test_without_a_critical_rate_at_each_decided_point_nothing_is_said_of_it() -> None:
    held = outcomes_of(lambda s: s["lr"] <= 0.03)
    for sharpness in ([math.nan, *[2.0] * 19], [-1.0] * 20, None):
        assert "critical" not in said(table_of(PLANE, held, sharpness))
    # That of a point that is not decided is not asked for.
    held[0] = None
    assert "critical" in said(table_of(PLANE, held, [math.nan, *[2.0] * 19]))


def test_the_key_of_a_learning_rate() -> None:
    keys = ("lr", "phases.0.optimizer.lr", "learning_rate", "lrs", "width")
    assert [is_learning_rate(key) for key in keys] == [True, True, True, False, False]
    assert 0 < LIKELIEST_CHANCE < 0.1


def test_why_most_are_undecided_and_where_runs_diverged_is_said() -> None:
    outcomes: list[bool | None] = [True, None, None, None, None]
    table = table_of(grid(lr=LR), outcomes, left_out=[4])
    table.verdicts["note"] = ["", "too noisy", "too short", "too noisy"]
    table.runs.loc[4, "state"] = "diverged"
    assert said(table) == (
        "holds at 1 of 5 points, is undecided at 3, its runs diverged at 1;"
        " undecided at 2: too noisy"
    )
