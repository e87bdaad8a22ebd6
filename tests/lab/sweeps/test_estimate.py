"""What a sweep would take: the trial run leaves nothing behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tomli_w

from tests.lab.small_study import RAW
from thalweg.lab.execution.processes import Child
from thalweg.lab.means import Means
from thalweg.lab.sweeps import estimate
from thalweg.lab.sweeps.axes import Axes
from thalweg.lab.sweeps.specs import sweep_specs


def test_a_run_that_points_share_is_counted_once_and_a_queue_is_not_tried(tmp_path: Path) -> None:
    file = tmp_path / "small.toml"
    phase = {"optimizer": {"name": "sgd", "lr": 0.05}, "batch_size": 20, "steps": 3}
    branches = {"a": {"steps": 2}, "b": {"steps": 4}}
    file.write_text(tomli_w.dumps({**RAW, "phases": [phase], "branches": branches}))
    specs = sweep_specs(file, Axes(grid={"branches.b.optimizer.lr": [0.1, 0.2]}))
    found = estimate.estimate(
        specs, root=tmp_path / "runs", name=None, means=Means(executor="slurm")
    )
    assert (found.runs, found.steps) == (6, 3 + 2 + 4 + 4)
    assert (found.seconds_of_a_step, found.workers) == (None, None)
    assert str(found).splitlines()[-1] == "steps    up to 13"


def test_the_trial_has_ended_after_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Child] = []

    def beginning(*given: Any, **options: Any) -> Child:
        begun.append(Child(*given, **options))
        return begun[0]

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    file = tmp_path / "small.toml"
    file.write_text(tomli_w.dumps(RAW))
    specs = sweep_specs(file, Axes(grid={"lr": [0.1, 0.2]}))
    monkeypatch.setattr(estimate, "Child", beginning)
    monkeypatch.setattr(estimate.time, "sleep", interrupted)
    means = Means(executor="inline")
    with pytest.raises(KeyboardInterrupt):
        estimate.estimate(specs, root=tmp_path / "runs", name=None, means=means)
    assert [child.is_running for child in begun] == [False]
