from __future__ import annotations

import importlib
from argparse import Namespace
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
def test_both_ways_take_the_runs_to_the_same_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    benchmark = importlib.import_module("figure_1a")
    options = Namespace(
        problem="digits", data_dir=None, device="cpu", seeds=2, lr=None, trunk=100,
        chunk_size=1024, replay=False,
    )  # fmt: skip
    figure = benchmark.prepare(options)
    ways = [benchmark.Measured(way(figure)) for way in benchmark.WAYS.values()]
    benchmark.measure(figure, ways, steps=15, settle=10)
    alone, lockstep = (measured.way.thetas() for measured in ways)
    begun = figure.beginnings.repeat_interleave(3, 0)
    assert (alone - lockstep).norm() < 0.01 * (alone - begun).norm()
    assert [measured.steps for measured in ways] == [5, 5]
    assert all(len(measured.reports) == 5 * 6 for measured in ways)
