from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from thalweg.lab.config import load_spec
from thalweg.lab.problem_facts import with_way_to_multiply

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::thalweg.GapClosed", "ignore::thalweg.TargetMissed")
def test_figure_1a_is_the_same_one_by_one_and_in_lockstep(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    benchmark = importlib.import_module("lockstep")
    words = ["--steps", "60", "--phases.0.steps", "60", "--seeds", "0", "1", "--samples", "300"]
    spec = with_way_to_multiply(load_spec("digits", words), 256, 10**9)
    alone, lockstep, begun = benchmark.compare(spec, tmp_path, "cpu")
    assert {task.branch for task in alone.ends} == set(spec.branches)
    for task, end in alone.ends.items():
        way = (end - begun[task.seed]).norm()
        split = spec.branch_phase(task.branch).split
        # Tracked splits are off by the target error of the gradient, most of which is dominant.
        tolerance = 0.1 if split is not None and split.basis == "live" else 1e-3
        assert (lockstep.ends[task] - end).norm() < tolerance * way, task
        losses = (benchmark.column(each, task, "loss") for each in (alone, lockstep))
        assert next(losses) == pytest.approx(next(losses), rel=1e-3)
