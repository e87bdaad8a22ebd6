from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from tests.analysis import synthetic
from tests.analysis.claims.branches import MAIN_NAMES, falling, table
from thalweg import registry
from thalweg.analysis.claims import ClaimUse, Verdict, judge_all
from thalweg.analysis.claims.verdicts import (
    claim_rows,
    number,
    render_verdicts,
    verdict_text,
    verdicts_to_json,
)
from thalweg.lab.store import StudyFolder


@pytest.fixture(scope="module")
def verdicts() -> list[Verdict]:
    return judge_all([registry.claims[name] for name in MAIN_NAMES], synthetic.study())


def printed(verdicts: list[Verdict], width: int = 110) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width).print(render_verdicts(verdicts))
    return stream.getvalue()


def test_the_table_shows_claim_number_spread_rule_and_verdict(verdicts: list[Verdict]) -> None:
    text = printed(verdicts)
    assert "gradient-aligns" in text
    assert "0.960 [0.960, 0.960]" in text
    assert "≥ 0.9" in text
    assert text.count("✓ holds") == 4
    assert "3 seeds" in text


def test_the_table_fits_a_terminal_of_80_columns(verdicts: list[Verdict]) -> None:
    text = printed(verdicts, width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("✓ holds") == 4


def test_words_stand_below_the_numbers_of_their_claim(verdicts: list[Verdict]) -> None:
    lines = [line.rstrip() for line in printed(verdicts, width=80).splitlines()]
    assert lines[1].split() == ["claim", "measured", "rule", "verdict"]
    at = next(n for n, line in enumerate(lines) if line.startswith("dominant-stalls"))
    assert lines[at + 1] == f"  {verdicts[1].statement}"
    assert lines[at + 2] == f"  measured: {verdicts[1].statistic}"
    assert lines[at].index("≤ 0.1") == lines[1].index("rule")


def test_a_long_name_is_wrapped_and_moves_no_other_column(verdicts: list[Verdict]) -> None:
    roles = {"plain": "sgd", "bulk": "bulk-sgd-of-every-100-steps-and-more"}
    lines = printed([*verdicts, replace(verdicts[2], roles=roles)], width=80).splitlines()
    assert max(map(len, lines)) <= 80
    assert len({line.index("✓") for line in lines if "✓" in line}) == 1


def test_a_note_is_shown_with_its_verdict(verdicts: list[Verdict]) -> None:
    changed = replace(verdicts[0], outcome="undecided", note="one seed")
    assert "one seed" in printed([changed])


def test_the_branches_of_a_use_are_shown_with_it(verdicts: list[Verdict]) -> None:
    use = replace(verdicts[2], roles={"plain": "sgd", "bulk": "bulk-k20"})
    assert "bulk-suffices: bulk-k20 against sgd" in printed([use], width=150)
    (entry,) = json.loads(verdicts_to_json([use]))
    assert entry["label"] == "bulk-suffices: bulk-k20 against sgd"
    assert entry["claim"] == "bulk-suffices"
    assert entry["roles"] == {"plain": "sgd", "bulk": "bulk-k20"}


def test_markup_in_a_claim_is_text_not_style(verdicts: list[Verdict]) -> None:
    assert "[red]x[/red]" in printed([replace(verdicts[0], statement="[red]x[/red]")])


def test_json_is_standard_and_complete(verdicts: list[Verdict]) -> None:
    broken = replace(verdicts[0], mean=math.inf, low=math.nan, values={0: math.nan, 1: math.inf})
    entries = json.loads(verdicts_to_json([broken, verdicts[1]]), parse_constant=pytest.fail)
    assert entries[0]["mean"] == "inf"
    assert entries[0]["low"] is None
    assert entries[0]["values"] == {"0": None, "1": "inf"}
    assert entries[1]["outcome"] == "holds"
    assert entries[1]["mean"] == verdicts[1].mean


def test_a_single_seed_has_no_spread(verdicts: list[Verdict]) -> None:
    assert verdict_text(replace(verdicts[0], low=math.nan, high=math.nan)).spread == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.96, "0.960"),
        (-0.0373, "\N{MINUS SIGN}0.0373"),
        (12.34, "12.3"),
        (123.4, "123"),
        (12345.0, "1.234e+04"),
        (math.nan, "\N{EN DASH}"),
        (math.inf, "∞"),
    ],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text


# The list of claims.


@pytest.fixture
def judged(tmp_path: Path) -> Path:
    """A folder with one study in which a claim is judged twice."""
    claim = registry.claims["bulk-suffices"]
    data = table(
        sgd={"loss": falling(0.5)},
        bulk_sgd={"loss": falling(0.5)},
        bulk_k20={"loss": falling(0.8)},
    )
    verdicts = judge_all([claim, ClaimUse(claim, {"plain": "sgd", "bulk": "bulk-k20"})], data)
    study = StudyFolder.create(tmp_path, "robustness", "")
    study.write_verdicts(json.loads(verdicts_to_json(verdicts)))
    return tmp_path


def test_each_verdict_of_a_study_is_listed(judged: Path) -> None:
    rows = {row["claim"]: row for row in claim_rows(judged)}
    assert rows["bulk-suffices"]["verdicts"] == {
        "robustness": "holds",
        "robustness, bulk-k20 against sgd": "does not hold",
    }
    assert rows["spectrum-gap"]["verdicts"] == {}
    assert set(rows) == set(registry.claims)


def test_verdicts_written_without_a_label_are_listed_by_their_study(judged: Path) -> None:
    study = StudyFolder(judged / "robustness")
    study.write_verdicts([{"claim": "bulk-suffices", "outcome": "holds"}])
    rows = {row["claim"]: row for row in claim_rows(judged)}
    assert rows["bulk-suffices"]["verdicts"] == {"robustness": "holds"}
