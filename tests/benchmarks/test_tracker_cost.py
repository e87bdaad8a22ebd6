from __future__ import annotations

import importlib
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def comparison(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("tracking.comparison")


def table(comparison: ModuleType) -> list:
    """A grid whose frontier is cost = 1 / error, a point above it, and one change."""

    def row(change: str, setting: str, error: float, cost: float):
        by_clock = change != "by estimate"
        return comparison.Row("here", change, setting, by_clock, error, error, cost, cost, 0.1)

    return [
        *(row("by clock", f"{e}", e, 0.01 / e) for e in (0.002, 0.005, 0.02)),
        row("by clock", "dear", 0.01, 2.0),
        row("by estimate", "target", 0.01, 1.5),
        row("with a change", "dear", 0.004, 2.5),
        row("beyond", "dear", 0.05, 1.0),
    ]


def test_the_cost_of_a_change_is_that_at_equal_error(comparison: ModuleType) -> None:
    rows = comparison.relative_costs(table(comparison))
    errors, _ = comparison.frontier(rows)
    assert errors.tolist() == [0.002, 0.005, 0.02]
    costs = {(r.change, r.setting): r.relative_cost for r in rows}
    assert costs["by clock", "0.005"] == pytest.approx(1)
    assert costs["by clock", "dear"] == pytest.approx(2)
    assert costs["by estimate", "target"] == pytest.approx(1.5)
    # On the frontier, where it was twice as dear before: a half.
    assert costs["with a change", "dear"] == pytest.approx(0.5)
    assert math.isnan(costs["beyond", "dear"])
    assert comparison.of_change(rows, "with a change", True) == pytest.approx(0.5)
    assert math.isnan(comparison.of_change(rows, "with a change", False))


def test_rows_are_read_as_they_were_saved(comparison: ModuleType, tmp_path: Path) -> None:
    rows = comparison.relative_costs(table(comparison))
    comparison.save(rows, tmp_path / "rows.csv")
    again = comparison.load(tmp_path / "rows.csv")
    assert [(r.change, r.setting, r.by_clock, r.error) for r in again] == [
        (r.change, r.setting, r.by_clock, r.error) for r in rows
    ]
    for row, read in zip(rows, again, strict=True):
        assert read.relative_cost == pytest.approx(row.relative_cost, rel=1e-4, nan_ok=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_change_can_be_measured_and_drawn_from_what_was_saved(tmp_path: Path) -> None:
    def benchmark(*words: str) -> str:
        command = [sys.executable, str(FOLDER / "tracker_cost.py"), "digits", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    said = benchmark("--quick", "--figure", str(tmp_path / "first.png"))
    for change in ("by clock", "by estimate", "stratified", "third, 3", "gap looked at"):
        assert change in said
    again = benchmark("--saved", str(tmp_path / "first.csv"), "--figure", str(tmp_path / "2.png"))
    assert again.strip() == said[said.index("relative cost") :].strip()
    assert (tmp_path / "2.png").read_bytes() == (tmp_path / "first.png").read_bytes()
