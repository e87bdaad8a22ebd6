from __future__ import annotations

import logging
import math
import time

import pytest
import torch

from thalweg.operators.symmetric import DenseOperator
from thalweg.spectrum import progress
from thalweg.spectrum.eigensolver import NotConverged, eigenpairs
from thalweg.spectrum.progress import SolveClock, SolveProgress, reported_to


class Slow(DenseOperator):
    """A product takes at least so long."""

    def __matmul__(self, vectors: torch.Tensor) -> torch.Tensor:
        time.sleep(0.002)
        return super().__matmul__(vectors)


def spectrum(size: int = 300) -> Slow:
    return Slow(torch.diag(torch.linspace(0, 1, size, dtype=torch.float64) ** 4))


def test_a_solve_says_how_far_it_has_come() -> None:
    seen: list[SolveProgress] = []
    with reported_to(seen.append, patience=0.0):
        space = eigenpairs(spectrum(), 3, tolerance=1e-6)
    assert [one.num_matvecs for one in seen] == sorted(one.num_matvecs for one in seen)
    assert math.isinf(seen[0].residual)
    assert seen[-1].residual <= 1e-6
    assert seen[-1].num_matvecs <= space.num_matvecs
    assert {one.what for one in seen} == {"3 largest eigenpairs"}
    # Half way the estimate is of the right order.
    middle = seen[len(seen) // 2]
    truth = seen[-1].seconds - middle.seconds
    assert truth / 5 < middle.seconds_left < 5 * truth


def test_it_ends_at_the_limit_of_products_and_says_so_before() -> None:
    seen: list[SolveProgress] = []
    with reported_to(seen.append, patience=0.0), pytest.warns(NotConverged):
        eigenpairs(spectrum(), 3, tolerance=1e-9, max_matvecs=12)
    assert seen[-1].num_matvecs == seen[-1].max_matvecs == 12
    assert "12 products of at most 12" in str(seen[-1])


def test_a_quick_solve_says_nothing_and_a_long_one_to_the_log_or_the_terminal(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, capsys: object
) -> None:
    with caplog.at_level(logging.INFO, "thalweg"):
        eigenpairs(spectrum(), 3)
        assert not caplog.records
        monkeypatch.setattr(progress, "_REPORT", patient := _Held((progress._say, 0.0)))
        eigenpairs(spectrum(), 3)
        assert "3 largest eigenpairs" in caplog.text
        patient.value = (None, 0.0)
        caplog.clear()
        eigenpairs(spectrum(), 3)
        assert not caplog.records


class _Held:
    def __init__(self, value: object) -> None:
        self.value = value

    def get(self) -> object:
        return self.value


def test_on_a_terminal_a_line_goes_to_standard_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with reported_to(progress._say, patience=0.0):
        clock = SolveClock("5 largest eigenpairs", 200, 1e-3)
        clock.note(5, math.inf)
        clock.note(6, 0.1)
        clock.note(12, 0.01)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("thalweg: 5 largest eigenpairs: 5 products of at most 200")
    assert "not known yet" in lines[0]
    assert "residual 1.0e-02 (to 1e-03)" in lines[-1]


def test_a_residual_that_does_not_fall_gives_no_estimate() -> None:
    seen: list[SolveProgress] = []
    with reported_to(seen.append, patience=0.0):
        clock = SolveClock("a", 100, 1e-3)
        clock.note(5, 0.1)
        clock.note(6, 0.2)
    assert math.isnan(seen[-1].seconds_left)
    assert "left" not in str(seen[-1])
