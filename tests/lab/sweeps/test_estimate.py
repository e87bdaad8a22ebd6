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
